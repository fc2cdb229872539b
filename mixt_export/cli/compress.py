"""`mixt compress`: replace a model's linear layers by low-rank factors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixt_export.compression.method import METHODS, OBJECTIVES
from mixt_export.compression.settings import Settings
from mixt_export.errors import UsageError

if TYPE_CHECKING:
    from mixt_export.compression import CompressionReport
    from mixt_export.compression.run import Plan

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

_DEFAULTS = Settings()


@app.command()
def compress(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Dense Hugging Face model folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "gfw-svd",
    keep: Annotated[float, typer.Option(help="Share of the targeted linears' parameters to keep, 0 to 1.")] = 0.9,
    calib: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|self",
            help="UTF-8 text; repeat to mix. 'self': text the model samples. Default: the shipped texts.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Compress only linears whose path matches. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Leave linears whose path matches. Repeatable.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="auto, uniform, water-filling, or a JSON file {linear: rank}.")] = "auto",
    objective: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(OBJECTIVES)}. Default: the method's own.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the factors: float32, float16, bfloat16. Default: the model's.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = _DEFAULTS.windows,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = _DEFAULTS.window,
    fisher_windows: Annotated[
        int, typer.Option(help="Windows of them that give gradients (gfw-svd).")
    ] = _DEFAULTS.fisher_windows,
    seed: Annotated[int, typer.Option(help="Seed of --calib self; all else is deterministic.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report there too (JSON; always in OUT).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")] = False,
) -> None:
    """Replace a model's linear layers by low-rank factors and say what each layer became."""
    from dataclasses import replace

    from mixt_export.cli.draw import RichProgress
    from mixt_export.optional import require

    require("torch", "mixt compress")
    require("transformers", "mixt compress")
    from mixt_export.compression.run import compress as run
    from mixt_export.compression.run import plan

    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"--report {report}: its folder does not exist; make it first.")
    settings = replace(_DEFAULTS, windows=windows, window=window, fisher_windows=fisher_windows)
    given = {
        "method": method,
        "keep": keep,
        "calib": calib or (),
        "include": include or (),
        "exclude": exclude or (),
        "ranks": ranks,
        "objective": objective,
        "settings": settings,
        "dtype": dtype,
        "seed": seed,
        "overwrite": overwrite,
    }
    if dry_run:
        _show_plan(plan(model, output, **given))  # type: ignore[arg-type]
        return
    result = run(model, output, progress=RichProgress(), **given)  # type: ignore[arg-type]
    _show(result, output)
    if report is not None:
        import json

        report.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")


def _show_plan(plan: Plan) -> None:
    typer.echo(
        f"{plan.method} ({plan.objective}, {plan.ranks} ranks): {len(plan.targets)} linears, "
        f"{plan.dense / 1e6:.1f} M parameters, of which {plan.budget / 1e6:.1f} M are kept"
    )
    typer.echo(f"calibration: {', '.join(plan.calibration) or 'none needed'}")
    typer.echo(f"temporary disk: up to {plan.scratch_bytes / 1e6:.0f} MB beside the output")
    typer.echo("nothing was written (--dry-run)")


def _show(report: CompressionReport, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "linears", "layers", "kept", "stay dense", "ranks", "output error", title=f"{report.method} → {output}"
    )
    kinds: dict[str, list[int]] = {}
    for index, layer in enumerate(report.layers):
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(index)
    for kind, indices in kinds.items():
        layers = [report.layers[index] for index in indices]
        ranks = sorted(layer.rank for layer in layers if layer.rank is not None)
        dense = sum(layer.out_features * layer.in_features for layer in layers)
        table.add_row(
            kind,
            str(len(layers)),
            f"{sum(layer.params for layer in layers) / dense:.3f}",
            str(len(layers) - len(ranks)),
            f"{ranks[0]}–{ranks[-1]}" if ranks else "–",
            f"{max(layer.output_error for layer in layers):.3g} at most",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"kept {report.keep_achieved:.4f} of {report.linears_params_before / 1e6:.1f} M parameters in the targeted "
        f"linears; the model has {report.model_params_after / 1e6:.1f} M of {report.model_params_before / 1e6:.1f} M"
    )
    console.print(
        f"{sum(report.seconds.values()):.0f} s, peak memory {report.peak_rss_bytes / 1e6:.0f} MB; "
        f"every layer is in {output / 'compress_report.json'}"
    )
