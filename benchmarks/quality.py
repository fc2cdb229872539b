"""What compression costs: the default recipe on SmolLM2, perplexity in and out of domain, seconds.

python -m benchmarks.quality [--keep 0.9 0.8] [--method gfw-svd] [--windows 24]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import measured, mixt, publish, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8])
    parser.add_argument("--method", nargs="+", default=["gfw-svd"])
    parser.add_argument("--windows", type=int, default=24)
    given = parser.parse_args()
    from mixt_export.evaluation import perplexity
    from mixt_export.sample.texts import EVALUATION, OUT_OF_DOMAIN

    def score(folder: Path) -> dict[str, float]:
        return {name: perplexity(folder, text, windows=given.windows).perplexity for name, text in EVALUATION.items()}

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dense = score(exported(sample(), folder / "dense"))
        rows: dict[str, Any] = {"dense": {name: round(value, 2) for name, value in dense.items()}}
        for method in given.method:
            for keep in given.keep:
                model = folder / f"{method}-{keep}"
                usage = measured(mixt("compress", sample(), "-o", model, "--method", method, "--keep", str(keep)))
                report = json.loads((model / "compress_report.json").read_text())
                found = score(exported(model, folder / f"{method}-{keep}-out"))
                rows[f"{method} {keep}"] = {
                    **{name: round(value, 2) for name, value in found.items()},
                    "times dense": {name: round(found[name] / dense[name], 3) for name in found},
                    "kept": round(report["keep_achieved"], 4),
                    "compress wall seconds": round(usage.wall, 1),
                    "compress peak RSS MB": round(usage.peak_rss / 1e6),
                }
    publish("quality", {"windows of 512 per text": given.windows, "out of domain": sorted(OUT_OF_DOMAIN), "rows": rows})


def exported(model: Path, out: Path) -> Path:
    measured(mixt("export", model, "-o", out, "--no-verify"))
    return out


if __name__ == "__main__":
    main()
