"""`mixt calibrate-device`: measure the constants with which the planner predicts times on this machine's CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mixt_export.calibration.measure import Calibration

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def calibrate_device(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write (default: one per CPU in the cache folder).")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of ONNX Runtime to measure with.")] = 1,
    show: Annotated[bool, typer.Option("--show", help="Print the constants of that file; measure nothing.")] = False,
) -> None:
    """Measure this machine's CPU with ONNX Runtime, about a minute, best while nothing else runs.

    An export uses the constants when it is told to: `mixt export --device-constants local` (or the file's name).
    """
    from mixt_export.calibration import load_device, save
    from mixt_export.calibration.measure import calibrate
    from mixt_export.calibration.store import local_path, require_writable
    from mixt_export.cli.draw import RichProgress
    from mixt_export.errors import UsageError

    path = output or local_path(threads)
    if show:
        device = load_device(path)
        typer.echo(f"{path}\n{device.name}")
        typer.echo(_table(device.as_dict()))
        return
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file with -o.")
    require_writable(path)
    calibration = calibrate(threads, RichProgress())
    save(calibration, path)
    typer.echo(_text(calibration))
    typer.echo(f"wrote {path}; used by mixt export --device-constants {'local' if output is None else path}")


def _text(calibration: Calibration) -> str:
    return (
        f"{calibration.device.name}: {len(calibration.measurements)} operators, median error "
        f"{100 * calibration.median_error:.0f} %, {100 * calibration.within_20_percent:.0f} % within 20 %\n"
        + _table(calibration.device.as_dict())
    )


def _table(constants: dict[str, str | float | int]) -> str:
    rows = [
        f"  {name:<14} {value if isinstance(value, int) else f'{1e9 * value:.4g} ns'}"
        for name, value in constants.items()
        if not isinstance(value, str)
    ]
    return "\n".join(rows)
