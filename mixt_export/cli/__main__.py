"""`python -m mixt_export.cli` is `mixt`."""

from mixt_export.cli.main import mixt

if __name__ == "__main__":
    mixt()
