"""Printing modelled times of a model on a device (`mixt inspect --device`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS = {"dense": "dense", "stored": "as stored", "planned": "as planned", "fused": "one kernel a linear"}


def times_of_folder(folder: Path, device: str) -> dict[str, Any]:
    """The report for a model folder; no weight is read."""
    from mixt_export.checkpoints import open_checkpoint
    from mixt_export.families import decoder_of
    from mixt_export.targets.devices import device_named
    from mixt_export.targets.times import times_report

    board = device_named(device)
    checkpoint = open_checkpoint(folder)
    return times_report(str(folder), decoder_of(checkpoint.config), checkpoint.factors, board)


def times_of_source(described: str, method: str | None, request: Any, device: str) -> dict[str, Any]:
    """The report for a preset or a config.json whose linears ``method`` would replace as ``request`` says."""
    from mixt_export.accounting import open_source
    from mixt_export.accounting.methods import variants
    from mixt_export.targets.devices import device_named
    from mixt_export.targets.times import times_report

    board = device_named(device)
    source = open_source(described)
    dense, *replaced = variants(source.decoder, method, request)
    asked = replaced[0] if replaced else dense
    return times_report(f"{source.name}, {asked.name}", source.decoder, asked.factors, board)


def show(console: Console, report: dict[str, Any]) -> None:
    """One table for decoding and one for prefill, a row for each group of equal blocks."""
    from rich.table import Table

    model, device = report["model"], report["device"]
    console.print(
        f"{report['name']} on {device['title']}, float16: {report['claim']}. Per kernel the larger of bytes / "
        f"{model['bandwidth'] / 1e9:.0f} GB/s and operations / {model['flops'] / 1e12:.1f} TFLOPS, plus "
        f"{1e6 * model['launch']:.0f} µs."
    )
    for step in report["steps"]:
        title = f"{step['name']}: {step['tokens']} new token(s) behind {step['past']}, µs per block (linears alone)"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for name in ("blocks", *_COLUMNS.values(), "of it attention", "other kernels"):
            table.add_column(name, justify="left" if name == "blocks" else "right")
        for group in report["groups"]:
            if group["step"] == step["name"]:
                cells = [f"{1e6 * group['whole'][way]:.0f} ({1e6 * group['linears'][way]:.0f})" for way in _COLUMNS]
                rest = [f"{1e6 * group[part]:.0f}" for part in ("attention", "glue")]
                table.add_row(_ranges(group["blocks"]), *cells, *rest)
        totals = report["totals"][step["name"]]
        table.add_row("model, ms", *(f"{1e3 * totals[way]:.2f}" for way in _COLUMNS), "", "")
        rates = (f"{step['tokens'] / totals[way]:.0f}" for way in _COLUMNS)
        table.add_row("tokens/s", *rates, "", "")
        console.print(table)


def _ranges(numbers: list[int]) -> str:
    """0-3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
