"""`mixt build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixt_export.cli.options import from_toml

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder written by `mixt export --target trt`.")],
    backend: Annotated[
        str | None,
        typer.Option(
            help="trt (TensorRT, for this GPU) or rtx (TensorRT-RTX, needs none). Default: what is installed."
        ),
    ] = None,
    sm: Annotated[
        int | None, typer.Option(min=1, help="rtx only: compute capability to compile for, 86 or 120. Default: 86.")
    ] = None,
    profiles: Annotated[
        str, typer.Option(help="one: prefill and decoding share a profile and the weights; two: one for each.")
    ] = "one",
    workspace: Annotated[str | None, typer.Option(help="Most scratch memory a layer may use: 512M, 2G.")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File that makes later builds quick; made when absent (trt only).")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="An engine that newer versions of TensorRT load, too.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="An engine for every GPU from Ampere on (not for Jetson).")
    ] = False,
    layer_outputs: Annotated[
        bool, typer.Option("--layer-outputs", help="A second engine that also puts out every block, to find a fault.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="Options from a TOML file; the command line wins.", is_eager=True, callback=from_toml),
    ] = None,
) -> None:
    """Build the TensorRT engine of an exported folder into OUT/engine; nothing is run on a GPU by TensorRT-RTX."""
    from mixt_export.building import build_engine
    from mixt_export.cli.draw import RichProgress

    report = build_engine(
        folder,
        backend=backend,
        sm=sm,
        profiles=profiles,
        workspace=workspace,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        layer_outputs=layer_outputs,
        progress=RichProgress(),
    )
    typer.echo(
        f"{report.claim}, version {report.library}: {report.layers} network layers, engine "
        f"{report.nbytes / 1e6:.1f} MB, {report.seconds:.1f} s"
    )
    typer.echo(report.kernels)
    weights = report.log_memory["weights_bytes"]
    typer.echo(
        f"what the library printed for this target (not the memory of a Jetson): weights "
        f"{'not stated' if weights is None else f'{weights / 1e6:.1f} MB'}"
    )
    for index, figures in enumerate(report.log_memory["profiles"]):
        parts = " · ".join(f"{name.removesuffix('_bytes')} {value / 1e6:.1f} MB" for name, value in figures.items())
        typer.echo(f"  profile {index}: {parts}")
    typer.echo(f"wrote {report.engine}")
