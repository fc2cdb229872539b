"""`mixt sweep`: the diagnostics of the MixT paper over the number of replaced blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixt_export.cli.base import BaseOption, use_base
from mixt_export.compression.method import METHODS
from mixt_export.sweep.options import MMLU_DEV, SweepOptions, variant_of

if TYPE_CHECKING:
    from mixt_export.sweep import SweepResult

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

_DEFAULTS = SweepOptions()


@app.command()
def sweep(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Dense Hugging Face model folder.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT", help="Folder for sweep.json and the plot; resumed if there."),
    ],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = _DEFAULTS.method,
    n_tensors: Annotated[
        list[int] | None, typer.Option("--n-tensors", metavar="N", help="N_T of MixT; repeat for several. Default: 4.")
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Parameters kept, of the other methods; repeatable. Default: 0.9."),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="COUNTS", help="How many last blocks to replace: 0,1,2,4 or 0:16:2 (both ends). Default: 0,1,2,4,8…"
        ),
    ] = None,
    refine_steps: Annotated[int, typer.Option(help="Steps of block refinement (MixT); 0: closed form only.")] = 0,
    recover_steps: Annotated[int, typer.Option(help="Steps of mixt recover after it; 0: none.")] = 0,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to score; repeatable. Default: the shipped evaluation texts.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows per text.")] = _DEFAULTS.windows,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = _DEFAULTS.window,
    questions: Annotated[
        str, typer.Option(metavar=f"{MMLU_DEV}|FILE.jsonl", help="Multiple-choice questions.")
    ] = _DEFAULTS.questions,
    limit: Annotated[int | None, typer.Option(help="At most so many questions, spread over the subjects.")] = (
        _DEFAULTS.limit
    ),
    score: Annotated[str, typer.Option(help="letters or continuation: how a choice is scored.")] = _DEFAULTS.scoring,
    calib: Annotated[
        list[str] | None, typer.Option(metavar="FILE|self", help="Calibration text of compress; repeatable.")
    ] = None,
    calib_windows: Annotated[int | None, typer.Option(help="Calibration windows of compress.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of compress.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0 takes half the cores.")] = 0,
    base: BaseOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew over rows measured otherwise.")] = False,
) -> None:
    """Replace the last N_B blocks for several N_B, measure each model, say where it breaks down.

    Perplexity, KL and agreement in and out of domain; accuracy on multiple-choice questions with the paper's output
    and prediction entropy; drift of the inter-layer similarity; and whether any of them has a transition.
    """
    from mixt_export.cli.draw import RichProgress
    from mixt_export.optional import require

    use_base(base)
    options = SweepOptions(
        method=method,
        n_tensors=tuple(n_tensors or ()),
        keep=tuple(keep or ()),
        blocks=blocks,
        refine_steps=refine_steps,
        recover_steps=recover_steps,
        texts=tuple(text or ()),
        calib=tuple(calib or ()),
        calib_windows=calib_windows,
        questions=questions,
        limit=limit,
        scoring=score,
        windows=windows,
        window=window,
        threads=threads,
        seed=seed,
        overwrite=overwrite,
    )
    require("torch", "mixt sweep")
    require("transformers", "mixt sweep")
    from mixt_export.sweep.run import sweep as run

    _show(run(model, output, options, progress=RichProgress()))


def _show(result: SweepResult) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    rows = result.data["rows"]
    domains = list(rows[0]["domains"])
    names = ["params", *(f"ppl {domain}" for domain in domains), "KL", "top-1"]
    console.print(_table(rows, names, lambda row: _text_cells(row, domains)))
    console.print(_table(rows, ["accuracy", "95 %", "same", "OE", "PE", "drift"], _question_cells))
    _note_questions(console, rows[0]["questions"], result.data["settings"]["questions"])
    for found in result.data["transitions"]:
        if not found["figure"].endswith("KL"):
            console.print(
                f"{variant_of(found['variant']).label}, {found['figure']}: {found['statement']}", markup=False
            )
    console.print(
        f"{result.measured} rows measured, {result.kept} kept; "
        f"{', '.join(str(path) for path in (result.path, *result.plots))}",
        markup=False,
    )


def _table(rows: list[dict[str, Any]], names: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True)
    for name in ("N_B", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        label = "dense" if row["variant"] is None else variant_of(row["variant"]).label
        table.add_row(label, str(row["n_blocks"]), *cells(row))
    return table


def _text_cells(row: dict[str, Any], domains: list[str]) -> list[str]:
    """KL and agreement are those of the first domain."""
    first = row["domains"][domains[0]]
    return [
        f"{row['params_share']:.1%}",
        *(_figure(row["domains"][domain]["perplexity"], ".2f") for domain in domains),
        _figure(first["kl"], ".3f"),
        _figure(first["agreement"], ".3f"),
    ]


def _question_cells(row: dict[str, Any]) -> list[str]:
    questions = row["questions"]
    low, high = questions["interval"]
    return [
        f"{questions['accuracy']:.3f}",
        f"{low:.2f}–{high:.2f}",
        f"{questions['same_choice_as_dense']:.2f}",
        _figure(questions["output_entropy"], ".3f"),
        _figure(questions["prediction_entropy"], ".3f"),
        _figure(row["drift"], ".4f"),
    ]


def _figure(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _note_questions(console: Any, dense: dict[str, Any], source: dict[str, Any]) -> None:
    """What the accuracies are worth."""
    low, high = dense["interval"]
    name = "MMLU dev questions (the few-shot split: this is no MMLU score)" if source["source"] == MMLU_DEV else ""
    verdict = "cannot be told from guessing" if low <= dense["chance"] <= high else "differs from guessing"
    often, label = max(zip(dense["predicted"], "ABCD", strict=True))
    console.print(
        f"smoke data: {dense['questions']} {name or 'questions of ' + source['source']}, zero-shot, scored by "
        f"{source['scoring']}; guessing gives {dense['chance']:.2f}, the dense model's 95 % interval is "
        f"{low:.2f} to {high:.2f}: it {verdict}, and answers {label} {often} times. Intervals are Wilson's; 'same': "
        "share of answers as the dense model's.",
        markup=False,
    )
