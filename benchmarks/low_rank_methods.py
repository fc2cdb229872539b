"""Every low rank method on the sample model at several sizes: perplexity in and out of domain, KL, seconds, memory.

python -m benchmarks.low_rank_methods [--keep 0.8 0.9 0.6] [--method gfw-svd …] [--windows 4] [--again]
python -m benchmarks.low_rank_methods --render          the table into docs/compression.md

A cell that benchmarks/results/low_rank_methods.json has is not run again. Every cell is one `mixt compress` in a
process of its own, one thread; statistics come from a cache that the first cells fill, so seconds are those of a
further ratio, and what filling costs is in the cells that did it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, measured, mixt, publish, sample

NAME = "low_rank_methods"
PAGE = Path(__file__).parent.parent / "docs" / "compression.md"

#: Row -> arguments of mixt compress. LASER is not here: its truncations are written as dense matrices or as factors of
#: whatever size lowers the loss, and have no --keep.
METHODS = {
    "svd": ["--method", "svd"],
    "asvd": ["--method", "asvd"],
    "svd-llm": ["--method", "svd-llm"],
    "svd-llm-v2": ["--method", "svd-llm-v2"],
    "svd-llm, attended": ["--method", "svd-llm", "--attended"],
    "svd-llm, remap8": ["--method", "svd-llm", "--store", "remap8"],
    "svd-llm, water-filled": ["--method", "svd-llm", "--ranks", "water-filling"],
    "gfw-svd": ["--method", "gfw-svd"],
    "aa-svd": ["--method", "aa-svd"],
    "svd-llm, updated": ["--method", "svd-llm", "--update", "anchored"],
    "aa-svd, water-filled": ["--method", "aa-svd", "--ranks", "water-filling"],
    "gfw-svd, anchored": ["--method", "gfw-svd", "--objective", "anchored"],
}
KEEPS = (0.8, 0.9, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens of each text")
    parser.add_argument("--cache", type=Path, help="folder of the statistics; default: one that is removed at the end")
    parser.add_argument("--again", action="store_true", help="forget earlier cells")
    parser.add_argument("--render", action="store_true", help="write the table into the page, run nothing")
    given = parser.parse_args()
    if given.render:
        render()
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    path = RESULTS / f"{NAME}.json"
    cells: dict[str, Any] = {}
    if path.is_file() and not given.again:
        found = json.loads(path.read_text(encoding="utf-8"))
        cells = found["cells"] if found["windows of 512 per text"] == given.windows else {}
    with tempfile.TemporaryDirectory() as scratch:
        for keep in given.keep:
            for method in given.method:
                name = f"{method} {keep:g}"
                if name not in cells:
                    cells[name] = cell(METHODS[method], keep, given.windows, given.cache or Path(scratch) / "cache")
                    publish(NAME, {"windows of 512 per text": given.windows, "cells": cells})


def cell(arguments: list[str], keep: float, windows: int, cache: Path) -> dict[str, Any]:
    """One run of mixt compress, from its report."""
    command = ["compress", *arguments, "--keep", f"{keep:g}", "--eval-windows", str(windows)]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        usage = measured(mixt(*command, sample(), "-o", output, "--cache", cache))
        report = json.loads((output / "compress_report.json").read_text(encoding="utf-8"))
    texts = {text["text"]: text["scores"] for text in report["evaluation"]}
    return {
        "command": " ".join(["mixt", *command]),
        "kept": round(report["keep_achieved"], 4),
        "dense linears": sum(layer["rank"] is None for layer in report["layers"]),
        "perplexity": {name: round(scores["compressed"]["perplexity"], 2) for name, scores in texts.items()},
        "times dense": {
            name: round(scores["compressed"]["perplexity"] / scores["dense"]["perplexity"], 3)
            for name, scores in texts.items()
        },
        "KL to dense": {name: round(scores["compressed"]["kl"], 4) for name, scores in texts.items()},
        "dense": {name: round(scores["dense"]["perplexity"], 2) for name, scores in texts.items()},
        "CPU seconds": round(usage.cpu, 1),
        "peak RSS MB": round(usage.peak_rss / 1e6),
        "from the cache": report["cached"],
        "measured": {stage: seconds for stage, seconds in report["seconds"].items() if stage == "statistics"},
    }


def render() -> None:
    """Write the table into the page."""
    found = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    between_marks(NAME, table(found["cells"]))


def between_marks(name: str, text: str) -> None:
    """Replace what stands between the marks of ``name`` in the page."""
    begin, end = f"[{name}]: # (begin)", f"[{name}]: # (end)"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def table(cells: dict[str, Any]) -> str:
    """Rows in the order of the share kept, then of the out of domain perplexity."""
    dense = next(iter(cells.values()))["dense"]
    lines = [
        f"Dense: {dense['addresses']:.4g} on the addresses, {dense['novel']:.4g} on the novel.",
        "",
        "| kept | method | addresses (in domain) | novel (out of domain) | KL, addresses / novel | CPU s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    keeps = sorted({name.rpartition(" ")[2] for name in cells}, key=float, reverse=True)
    for keep in keeps:
        rows = {name.rpartition(" ")[0]: row for name, row in cells.items() if name.endswith(f" {keep}")}
        for method, row in sorted(rows.items(), key=lambda item: -item[1]["perplexity"]["novel"]):
            scores = [f"{_short(row['perplexity'][text])} (×{_short(row['times dense'][text])})" for text in TEXTS]
            kl = " / ".join(f"{row['KL to dense'][text]:.3f}" for text in TEXTS)
            whole = "" if _statistics(row) <= set(row["from the cache"]) else " *"
            lines.append(
                f"| {row['kept']:.3f} | {method} | {scores[0]} | {scores[1]} | {kl} | "
                f"{row['CPU seconds']:.0f}{whole} | {row['peak RSS MB']} |"
            )
    return "\n".join(lines)


TEXTS = ("addresses", "novel")


def _statistics(row: dict[str, Any]) -> set[str]:
    """Kinds of entries that the row needs of the cache."""
    command = row["command"]
    one_pass = "--method svd " not in command and "--method aa-svd --keep" not in command
    needed = {"outputs", "inputs"} if one_pass or "water-filling" in command else {"outputs"}
    needed |= {"fisher"} if "gfw-svd" in command else set()
    return needed | ({"traces"} if "water-filling" in command else set())


def _short(value: float) -> str:
    return f"{value:.3g}" if value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
