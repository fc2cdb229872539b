"""`mixt eval`: perplexity on texts, and the distance from another model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixt_export.cli.base import BaseOption, use_base

if TYPE_CHECKING:
    from mixt_export.evaluation import TextScore

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Exported folder, or model folder (run in PyTorch).")],
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text; several allowed. Default: the shipped evaluation texts.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Another model: adds KL(other ‖ this) and agreement.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows per text. Default: all of it.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    base: BaseOption = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 takes half the cores.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Perplexity of a model on a text; KL and top-1 agreement against another model."""
    from mixt_export.cli.draw import RichProgress
    from mixt_export.evaluation import open_scorer, perplexity
    from mixt_export.verification.tokens import read_text

    use_base(base)
    named = {path.name: path for path in text} if text else _shipped()
    contents = {name: read_text(path) for name, path in named.items()}  # a bad file ends it before models are loaded
    progress = RichProgress()
    with progress.task("loading"):
        ours = open_scorer(model, threads)
        theirs = open_scorer(against, threads) if against else None
    scores = {
        name: perplexity(ours, content, window=window, windows=windows, reference=theirs, progress=progress)
        for name, content in contents.items()
    }
    if json_output:
        _print_json(model, against, window, scores)
    else:
        _print_table(scores, compared=against is not None)


def _shipped() -> dict[str, Path]:
    from mixt_export.sample.texts import EVALUATION

    return dict(EVALUATION)


def _print_json(model: Path, against: Path | None, window: int, scores: dict[str, TextScore]) -> None:
    import dataclasses
    import json

    texts: dict[str, Any] = {
        name: {**dataclasses.asdict(score), "perplexity": score.perplexity} for name, score in scores.items()
    }
    body = {"model": str(model), "against": str(against) if against else None, "window": window, "texts": texts}
    typer.echo(json.dumps(body, indent=2))


def _print_table(scores: dict[str, TextScore], *, compared: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("text", no_wrap=True)
    extra = ("against", "ratio", "KL", "top-1") if compared else ()
    for name in ("tokens", "perplexity", *extra):
        table.add_column(name, justify="right")
    for name, score in scores.items():
        table.add_row(escape(name), f"{score.tokens:,}", f"{score.perplexity:.3f}", *_comparison(score))
    Console(highlight=False).print(table)


def _comparison(score: TextScore) -> tuple[str, ...]:
    if score.other_perplexity is None:
        return ()
    return (
        f"{score.other_perplexity:.3f}",
        f"{score.perplexity / score.other_perplexity:.4f}",
        f"{score.kl:.2e}",
        f"{score.agreement:.4f}",
    )
