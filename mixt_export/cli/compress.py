"""`mixt compress`: replace a model's linear layers by factors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixt_export.cli.base import BaseOption, use_base
from mixt_export.compression.method import DEFAULT_METHOD, METHODS, OBJECTIVES, RANK_RULES
from mixt_export.compression.recover.settings import RecoverSettings
from mixt_export.compression.settings import Settings
from mixt_export.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mixt_export.compression import CompressionReport, LayerReport
    from mixt_export.compression.controls import Controls, TextScores
    from mixt_export.compression.job import Plan

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

_DEFAULTS = Settings()
_LOW_RANK, _MIXT = "Low rank methods", "MixT"
_TUCKER, _LASER = "Tucker", "LASER"
_TT = "Tensor trains (tt)"
_RECOVERY = "Recovery"
_RECOVER = RecoverSettings()
_TD_MOE = "Mixture of experts (td-moe)"


@app.command()
def compress(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Dense Hugging Face model folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = DEFAULT_METHOD,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCKS",
            help="last:N, first:N, a list such as 0,3,7-9, or all. Default: last:4 for mixt, tt and laser, else all.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Compress only linears whose path matches. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Leave linears whose path matches. Repeatable.")
    ] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|self",
            help="UTF-8 text; repeat to mix. 'self': text the model samples. Default: the shipped texts.",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the targeted linears' parameters to keep, 0 to 1. Default: 0.9.", rich_help_panel=_LOW_RANK
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help=f"auto, {', '.join(RANK_RULES)}, or a JSON file {{linear: rank}}. Default: auto.",
            rich_help_panel=_LOW_RANK,
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(OBJECTIVES)}. Default: the method's own.", rich_help_panel=_LOW_RANK),
    ] = None,
    asvd_alpha: Annotated[
        float | None,
        typer.Option(
            help="Power of the inputs' mean size that scales the columns (asvd). Default: 0.5.",
            rich_help_panel=_LOW_RANK,
        ),
    ] = None,
    attended: Annotated[
        bool | None,
        typer.Option(
            "--attended/--no-attended",
            help="Judge value projections by what heads make of them (objective input-aware).",
            rich_help_panel=_LOW_RANK,
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            metavar="OBJECTIVE",
            help="Refit factors by least squares on the compressed model's inputs to the outputs of this objective: "
            "shift-aware or anchored. Default: no.",
            rich_help_panel=_LOW_RANK,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="remap8",
            help="Store min(out, in) rows of both factors in 8 bits, the rest in 16; --keep then counts numbers of 16 "
            "bits. Default: factors in --dtype.",
            rich_help_panel=_LOW_RANK,
        ),
    ] = None,
    fisher_windows: Annotated[
        int | None,
        typer.Option(
            help=f"Windows of them that give gradients (gfw-svd). Default: {_DEFAULTS.fisher_windows}.",
            rich_help_panel=_LOW_RANK,
        ),
    ] = None,
    n_tensors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|REGEX=N",
            help="N_T, tensors per linear, or of the linears whose path matches. Repeatable. Default: 4.",
            rich_help_panel=_MIXT,
        ),
    ] = None,
    bond: Annotated[int | None, typer.Option(help="Local dimension d. Default: 2.", rich_help_panel=_MIXT)] = None,
    paper_padding: Annotated[
        bool | None,
        typer.Option("--paper-padding", help="Pad features to powers of d as the paper does.", rich_help_panel=_MIXT),
    ] = None,
    permute: Annotated[
        bool | None,
        typer.Option(
            "--permute/--no-permute",
            help="Reorder the hidden channels of MLPs to suit MixT; free when the model runs. Default: do.",
            rich_help_panel=_MIXT,
        ),
    ] = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of block refinement after the closed form (low rank, mixt, tt); 0: none. Default: 60 for mixt, "
            "else none.",
            rich_help_panel=_MIXT,
        ),
    ] = None,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls",
            help="Score the result beside deleted blocks and equal low rank on held-out texts. Default: do.",
            rich_help_panel=_MIXT,
        ),
    ] = None,
    whitening: Annotated[
        str | None,
        typer.Option(
            help="What experts' errors are weighed by: none, input, output or both. Default: input.",
            rich_help_panel=_TD_MOE,
        ),
    ] = None,
    expert_down: Annotated[
        bool | None,
        typer.Option(
            "--expert-down/--no-expert-down",
            help="Decompose the experts' down projections too. Default: gate and up alone.",
            rich_help_panel=_TD_MOE,
        ),
    ] = None,
    modes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODES|REGEX=MODES",
            help="balanced, prime, or input:output modes such as 8x8x9:8x12x16. Repeatable. Default: balanced.",
            rich_help_panel=_TT,
        ),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(help="Cores of modes that are not given, 2 to 12. Default: 3.", rich_help_panel=_TT)
    ] = None,
    tt_rank: Annotated[
        list[str] | None,
        typer.Option(
            metavar="R|REGEX=R",
            help="The largest bond. Repeatable. Default: what --keep allows (0.5).",
            rich_help_panel=_TT,
        ),
    ] = None,
    outliers: Annotated[
        float | None,
        typer.Option(
            help="Share of the entries, largest first, that are stored beside the train. Default: none.",
            rich_help_panel=_TT,
        ),
    ] = None,
    tucker_ranks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RANKS|KIND=RANKS",
            help="R1,R2,R3 of attention heads (or q,s for q·h,q,s), gate-up=R1,R2 or single=R. Repeatable. "
            "Default: what --keep allows, with the least error.",
            rich_help_panel=_TUCKER,
        ),
    ] = None,
    tucker_share: Annotated[
        bool | None,
        typer.Option(
            "--tucker-share/--no-tucker-share",
            help="q, k, v and o share factors, and gate and up. Default: do.",
            rich_help_panel=_TUCKER,
        ),
    ] = None,
    hooi_sweeps: Annotated[
        int | None, typer.Option(help="Sweeps of the iteration at most. Default: 50.", rich_help_panel=_TUCKER)
    ] = None,
    hooi_tolerance: Annotated[
        float | None,
        typer.Option(help="Share of ||W||² below which a sweep is the last. Default: 1e-7.", rich_help_panel=_TUCKER),
    ] = None,
    rho: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the full rank that may be kept. Repeatable. Default: 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8.",
            rich_help_panel=_LASER,
        ),
    ] = None,
    search: Annotated[
        bool | None,
        typer.Option(
            "--search/--no-search",
            help="Keep only truncations that lower the loss on the texts, or truncate all to --rho. Default: search.",
            rich_help_panel=_LASER,
        ),
    ] = None,
    search_windows: Annotated[
        int | None, typer.Option(help="Windows that give the loss. Default: 8.", rich_help_panel=_LASER)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="The search ends then, if not before. Default: 60.", rich_help_panel=_LASER)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the factors: float32, float16, bfloat16. Default: the model's.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = _DEFAULTS.windows,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = _DEFAULTS.window,
    seed: Annotated[int, typer.Option(help="Seed of --calib self and of refinement; all else is deterministic.")] = 0,
    eval_text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="UTF-8 text to score on. Repeatable. Default: two shipped texts."),
    ] = None,
    eval_windows: Annotated[int, typer.Option(help="Windows of 512 tokens of each text that are scored.")] = 2,
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Measure perplexity before and after.")] = True,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep statistics there. Default: $MIXT_STATISTICS, else the user's cache."),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no statistics and use none.")] = False,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Then train the factors against MODEL on the calibration texts, as mixt recover does.",
            rich_help_panel=_RECOVERY,
        ),
    ] = False,
    recover_steps: Annotated[
        int | None, typer.Option(help=f"Default: {_RECOVER.steps}.", rich_help_panel=_RECOVERY)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from OUT.recover after an interruption of --recover.", rich_help_panel=_RECOVERY
        ),
    ] = False,
    base: BaseOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report there too (JSON; always in OUT).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")] = False,
) -> None:
    """Replace a model's linear layers by factors and say what each layer became."""
    from dataclasses import replace

    from mixt_export.cli.draw import RichProgress
    from mixt_export.optional import require

    use_base(base)
    require("torch", "mixt compress")
    require("transformers", "mixt compress")
    from mixt_export.compression.run import compress as run
    from mixt_export.compression.run import plan

    if cache is not None and no_cache:
        raise UsageError("--cache and --no-cache: give one of them.")
    if eval_text and not evaluate:
        raise UsageError("--eval-text and --no-eval: give one of them.")
    if (resume or recover_steps is not None) and not recover:
        raise UsageError("--resume and --recover-steps go with --recover.")
    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"--report {report}: its folder does not exist; make it first.")
    measured = {"windows": windows, "window": window, "fisher_windows": fisher_windows}
    settings = replace(_DEFAULTS, **{name: value for name, value in measured.items() if value is not None})
    everywhere: dict[str, Any] = {
        "method": method,
        "blocks": blocks,
        "include": include or (),
        "exclude": exclude or (),
        "calib": calib or (),
        "settings": settings,
        "dtype": dtype,
        "seed": seed,
        "overwrite": overwrite,
        "cache": cache or not no_cache,
        "evaluate": evaluate,
        "eval_text": eval_text or (),
        "eval_windows": eval_windows,
    }
    of_a_family = {
        "keep": keep,
        "ranks": ranks,
        "objective": objective,
        "asvd_alpha": asvd_alpha,
        "update": update,
        "store": store,
        "attended": attended,
        "n_tensors": n_tensors,
        "bond": bond,
        "paper_padding": paper_padding,
        "permute": permute,
        "refine_steps": refine_steps,
        "controls": controls,
        "whitening": whitening,
        "expert_down": expert_down,
        "modes": modes,
        "cores": cores,
        "tt_rank": tt_rank,
        "outliers": outliers,
        "tucker_ranks": tucker_ranks,
        "tucker_share": tucker_share,
        "hooi_sweeps": hooi_sweeps,
        "hooi_tolerance": hooi_tolerance,
        "rho": rho,
        "search": search,
        "search_windows": search_windows,
        "minutes": minutes,
    }
    given = everywhere | {name: value for name, value in of_a_family.items() if value is not None}
    if dry_run:
        _show_plan(plan(model, output, **given))
        return
    if recover:
        changed = {} if recover_steps is None else {"steps": recover_steps}
        _recover(model, output, given, replace(_RECOVER, **changed), resume, report)
        return
    result = run(model, output, progress=RichProgress(), **given)
    _show(result, output)
    if report is not None:
        import json

        report.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")


def _recover(
    model: Path, output: Path, given: dict[str, Any], settings: RecoverSettings, resume: bool, report: Path | None
) -> None:
    """Compress, recover, show both; the file ``report`` gets both, by name."""
    import json

    from mixt_export.cli.draw import RichProgress
    from mixt_export.cli.recover import show as show_recovery
    from mixt_export.compression.recover.recipe import compress_and_recover

    made, recovered = compress_and_recover(
        model, output, options=given, settings=settings, resume=resume, progress=RichProgress()
    )
    if made is not None:
        _show(made, output)
    show_recovery(recovered, output)
    if report is not None:
        compression = json.loads((output / "compress_report.json").read_text(encoding="utf-8"))
        both = {"compress": compression, "recover": recovered.to_dict()}
        report.write_text(json.dumps(both, indent=1) + "\n", encoding="utf-8")


def _show_plan(plan: Plan) -> None:
    recipe = ", ".join(f"{name} {value}" for name, value in plan.recipe.items())
    typer.echo(
        f"{plan.method} ({recipe}): {len(plan.targets)} linears, "
        f"{plan.dense / 1e6:.1f} M parameters, of which {plan.budget / 1e6:.1f} M are kept"
    )
    typer.echo(f"calibration: {', '.join(plan.calibration) or 'none needed'}")
    typer.echo(f"temporary disk: up to {plan.scratch_bytes / 1e6:.0f} MB beside the output")
    typer.echo("nothing was written (--dry-run)")


def _show(report: CompressionReport, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "linears", "layers", "kept", "stay dense", "became", "output error", title=f"{report.method} → {output}"
    )
    kinds: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    for kind, layers in kinds.items():
        dense = sum(layer.out_features * layer.in_features for layer in layers)
        table.add_row(
            kind,
            str(len(layers)),
            f"{sum(layer.params for layer in layers) / dense:.3f}",
            str(sum(layer.method == "dense" for layer in layers)),
            ", ".join(_became(layers)) or "–",
            f"{max(layer.output_error for layer in layers):.3g} at most",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"kept {report.keep_achieved:.4f} of {report.linears_params_before / 1e6:.1f} M parameters in the targeted "
        f"linears; the model has {report.model_params_after / 1e6:.1f} M of {report.model_params_before / 1e6:.1f} M"
    )
    if report.controls is not None:
        _show_controls(console, report.controls)
    if report.controls is None or _texts(report.controls.texts) != _texts(report.evaluation):
        _show_evaluation(console, report)
    if report.search is not None:
        found = report.search
        console.print(
            f"loss {found.before:.4f} → {found.after:.4f} nats on the windows searched on, {found.check_before:.4f} → "
            f"{found.check_after:.4f} on others, {found.trials} trials"
        )
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items() if seconds >= 0.5)
    console.print(
        f"{sum(report.seconds.values()):.0f} s{f' ({stages})' if stages else ''}, "
        f"peak memory {report.peak_rss_bytes / 1e6:.0f} MB; "
        f"every layer is in {output / 'compress_report.json'}"
    )


def _texts(scores: Sequence[TextScores]) -> list[str]:
    return [text.text for text in scores]


def _show_evaluation(console: Any, report: CompressionReport) -> None:
    for text in report.evaluation:
        before, after = text.scores["dense"], text.scores["compressed"]
        console.print(
            f"perplexity on {text.text} ({text.domain}, {text.windows} windows of {text.window} tokens): "
            f"{before.perplexity:.4g} → {after.perplexity:.4g} (×{after.perplexity / before.perplexity:.3f}), "
            f"KL to dense {after.kl:.3f} nats"
        )


def _became(layers: list[LayerReport]) -> Iterator[str]:
    """Ranks and numbers of tensors, each as a value or a range."""
    ranks = [layer.rank for layer in layers if layer.rank is not None]
    terms = [layer.terms for layer in layers if layer.terms is not None]
    for what, found in (("rank", ranks), ("N_T", terms)):
        if found:
            low, high = min(found), max(found)
            yield f"{what} {low}" if low == high else f"{what} {low}–{high}"
    cores = sorted({layer.ranks for layer in layers if layer.ranks is not None})
    if cores:
        smallest, largest = ("x".join(map(str, ranks)) for ranks in (cores[0], cores[-1]))
        yield f"core {smallest}" if len(cores) == 1 else f"cores {smallest}–{largest}"


def _show_controls(console: Any, controls: Controls) -> None:
    from rich.table import Table

    table = Table("", "parameters", title="perplexity (KL to dense in nats) on held-out texts", title_justify="left")
    for scores in controls.texts:
        table.add_column(f"{scores.text}\n{scores.domain}")
    for variant, params in controls.params.items():
        cells = [scores.scores[variant] for scores in controls.texts]
        table.add_row(variant, f"{params / 1e6:.2f} M", *(f"{cell.perplexity:.4g} ({cell.kl:.3f})" for cell in cells))
    console.print(table)
