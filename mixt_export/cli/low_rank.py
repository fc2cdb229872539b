"""`mixt inspect --detect-low-rank`: which dense linears have a small numerical rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def find_low_rank(model: Path, tolerance: float) -> dict[str, Any]:
    """Read every dense linear of the folder ``model`` once. Raises UsageError for a tolerance that is no share."""
    from mixt_export.checkpoints import open_checkpoint
    from mixt_export.cli.draw import RichProgress
    from mixt_export.passes.low_rank import check_tolerance, low_rank_report

    check_tolerance(tolerance)
    return low_rank_report(open_checkpoint(model), tolerance, RichProgress())


def print_low_rank(console: Console, report: dict[str, Any]) -> None:
    """One line per linear that was found."""
    found = report["found"]
    console.print(
        f"low rank at {report['tolerance']:g}: {len(found)} of {report['examined']} dense linears have a rank that pays"
    )
    for entry in found:
        verdict = "no loss" if entry["lossless"] else f"loses more than float32 rounding ({entry['allowed']:.1e})"
        outputs, inputs = entry["shape"]
        console.print(
            f"  {entry['name']}  {outputs} × {inputs}, rank {entry['rank']}, relative error {entry['error']:.1e}: "
            f"{verdict}"
        )
