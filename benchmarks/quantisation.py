"""What weights of few bits cost: perplexity, KL and bytes of a model's quantised exports beside its float export.

python -m benchmarks.quantisation [MODEL ...] [--kinds int8 int4] [--groups 32] [--heads int8] [--roundings nearest]

Each export measures itself on the shipped evaluation texts, as it runs (activations rounded to int8). Writes
benchmarks/results/quantisation.json; docs/quantisation.md quotes it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, sample
from mixt_export.quantisation import Quantisation
from mixt_export.targets import export


def measured(model: Path, kind: str, group: int, head: str, rounding: str) -> dict[str, Any]:
    """One export's loss, bytes and CPU seconds."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = Quantisation.named(kind, group, head, rounding)
        entry = export(model, Path(folder) / "out", quantisation=settings, verify=False).manifest["quantisation"]
    return {
        "model": model.name,
        "kind": kind,
        "group": group,
        "head": head,
        "rounding": entry["rounding"],
        "bytes": entry["bytes"],
        "cpu_seconds": time.process_time() - began,
        **entry["loss"],
    }


def main() -> None:
    """Measure every combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["int8", "int4"])
    parser.add_argument("--groups", nargs="+", type=int, default=[32])
    parser.add_argument("--heads", nargs="+", default=["int8"])
    parser.add_argument("--roundings", nargs="+", default=["nearest", "calibrated"])
    args = parser.parse_args()
    rows = []
    print("| model | bits | group | head | rounding | MB | perplexity | change | KL |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model, *choice in itertools.product(
        args.models or [sample()], args.kinds, args.groups, args.heads, args.roundings
    ):
        row = measured(model, *choice)
        rows.append(row)
        change = row["perplexity"] / row["perplexity_before"] - 1
        print(
            f"| {row['model']} | {row['kind']} | {row['group']} | {row['head']} | {row['rounding']} | "
            f"{row['bytes'] / 1e6:.1f} | {row['perplexity_before']:.2f} → {row['perplexity']:.2f} | {change:+.1%} | "
            f"{row['kl']:.4f} |",
            flush=True,
        )
    (RESULTS / "quantisation.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
