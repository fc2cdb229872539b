"""How much the default low rank method depends on what it is calibrated on: texts, parts of them, how many windows.

python -m benchmarks.low_rank_data [--keep 0.8] [--windows 4] [--only NAME …]
python -m benchmarks.low_rank_data --render          the table into docs/compression.md

As benchmarks.low_rank_methods: each row is one `mixt compress` in a process of its own, one thread, and a row that
benchmarks/results/low_rank_data.json has is not run again. *Halves* are the two halves of both shipped calibration
texts: other tokens of the same domains, which is what another seed would be, as windows are cut without chance.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, publish
from benchmarks.low_rank_methods import TEXTS, between_marks, cell

NAME = "low_rank_data"
GFW = ["--method", "gfw-svd"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens of each text")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--cache", type=Path, help="folder of the statistics; default: one that is removed at the end")
    parser.add_argument("--render", action="store_true", help="write the table into the page, run nothing")
    given = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else {}
    if given.render:
        between_marks(NAME, table(rows))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.only:
            if name not in rows:
                arguments = ROWS[name](Path(scratch))
                rows[name] = cell(arguments, given.keep, given.windows, given.cache or Path(scratch) / "cache")
                publish(NAME, {"kept": given.keep, "windows of 512 per text": given.windows, "rows": rows})


def table(rows: dict[str, Any]) -> str:
    """In the order of ROWS."""
    lines = [
        "| calibrated on | addresses (in domain) | novel (out of domain) | KL, addresses / novel | CPU s |",
        "|---|---|---|---|---|",
    ]
    for name in (name for name in ROWS if name in rows):
        row = rows[name]
        scores = " | ".join(f"×{row['times dense'][text]:.3f}" for text in TEXTS)
        kl = " / ".join(f"{row['KL to dense'][text]:.3f}" for text in TEXTS)
        lines.append(f"| {name} | {scores} | {kl} | {row['CPU seconds']:.0f} |")
    return "\n".join(lines)


def half(which: int) -> Callable[[Path], list[str]]:
    """Arguments for one half of each shipped calibration text, cut at a line."""

    def arguments(scratch: Path) -> list[str]:
        from mixt_export.sample.texts import CALIBRATION

        found: list[str] = list(GFW)
        for name, path in CALIBRATION.items():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            middle = len(lines) // 2
            part = scratch / f"{name}-{which}.txt"
            part.write_text("".join(lines[middle:] if which else lines[:middle]), encoding="utf-8")
            found += ["--calib", str(part)]
        return found

    return arguments


def only(text: str) -> Callable[[Path], list[str]]:
    """Arguments for one shipped text."""

    def arguments(_scratch: Path) -> list[str]:
        from mixt_export.sample.texts import CALIBRATION

        return [*GFW, "--calib", str(CALIBRATION[text])]

    return arguments


def fixed(*more: str) -> Callable[[Path], Sequence[str]]:
    """Arguments on the default texts."""
    return lambda _scratch: [*GFW, *more]


ROWS: dict[str, Callable[[Path], Any]] = {
    "both texts (default: 64 windows, 16 for gradients)": fixed(),
    "their first halves": half(0),
    "their second halves": half(1),
    "addresses alone": only("addresses"),
    "jargon alone": only("jargon"),
    "both, gradients from 4 windows": fixed("--fisher-windows", "4"),
    "both, gradients from 32 windows": fixed("--fisher-windows", "32"),
    "both, ranks by `relative`": fixed("--ranks", "relative"),
}

if __name__ == "__main__":
    main()
