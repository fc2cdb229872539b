"""What `mixt export` says of the passes over the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer


def describe_passes(record: Mapping[str, Any]) -> None:
    """One line per pass of a manifest's ``passes``; nothing without any."""
    found = record.get("detect_low_rank")
    if found is not None:
        linears = found["linears"]
        ranks = [entry["rank"] for entry in linears.values()]
        errors = [entry["error"] for entry in linears.values()]
        typer.echo(
            f"low rank at {found['tolerance']:g}: {len(linears)} dense linears became two factors"
            + (f", ranks {min(ranks)} to {max(ranks)}, relative error at most {max(errors):.1e}" if ranks else "")
        )
    turned = record.get("turn")
    if turned is not None:
        typer.echo(f"turned the factors of {turned['linears']} linears, so that integers fit them better")
    balanced = record.get("balance")
    if balanced is not None:
        typer.echo(
            f"balanced by {balanced['driven_by']}: {balanced['linears']} linears, slices of their cores moved by up to "
            f"2^{balanced['largest_power']:g}"
        )
