"""`mixt recover`: train the factors of a compressed model against the dense model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixt_export.cli.base import BaseOption, use_base
from mixt_export.compression.recover.settings import RecoverSettings
from mixt_export.errors import UsageError

if TYPE_CHECKING:
    from mixt_export.compression.recover import RecoverReport

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

_DEFAULTS = RecoverSettings()


@app.command()
def recover(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Factorised model folder, of any method.")],
    teacher: Annotated[Path, typer.Option(metavar="DENSE", help="The dense model folder it was made from.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text to train on; repeat to mix. Default: the shipped calibration texts."),
    ] = None,
    eval_text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to measure before and after, never trained on; repeatable. Default: the shipped "
            "evaluation texts, unless --text is given."
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text of another domain that chooses the best step together with the ends of --text; "
            "repeatable. Default: text that the dense model samples."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _DEFAULTS.steps,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = _DEFAULTS.batch,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = _DEFAULTS.window,
    windows: Annotated[
        int | None, typer.Option(help="Windows to train on, over all texts. Default: as many as the steps visit.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Longest step of a factor, relative to its norm (Muon). Default: by the share kept."),
    ] = None,
    lr: Annotated[
        float, typer.Option(help="Highest learning rate of norms, biases and other vectors (Adam).")
    ] = _DEFAULTS.learning_rate,
    hidden_weight: Annotated[
        float, typer.Option(help="Weight of the relative error of the final hidden state beside the KL divergence.")
    ] = _DEFAULTS.hidden_weight,
    seed: Annotated[int, typer.Option(help="Of the order of the windows and the drawn vocabulary.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.recover after an interruption.")] = False,
    base: BaseOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report there too (JSON; always in OUT).")
    ] = None,
) -> None:
    """Distil the dense model into the factors of a compressed one and say what that brought."""
    from dataclasses import replace

    from mixt_export.cli.draw import RichProgress
    from mixt_export.optional import require

    use_base(base)
    require("torch", "mixt recover")
    require("transformers", "mixt recover")
    from mixt_export.compression.recover.run import recover as run

    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"--report {report}: its folder does not exist; make it first.")
    settings = replace(
        _DEFAULTS,
        steps=steps,
        batch=batch,
        window=window,
        windows=windows,
        matrix_rate=rate,
        learning_rate=lr,
        hidden_weight=hidden_weight,
    )
    result = run(
        student,
        teacher,
        output,
        texts=text or (),
        eval_texts=eval_text or None,
        validation=validation or (),
        settings=settings,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        progress=RichProgress(),
    )
    show(result, output)
    if report is not None:
        import json

        report.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")


def show(report: RecoverReport, output: Path) -> None:
    """The scores as a table, what was trained, what it took."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"perplexity of {output}", title_justify="left")
    table.add_column("text", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("dense", "before", "after", "ratio", "KL"):
        table.add_column(name, justify="right")
    for score in report.scores:
        table.add_row(
            escape(score.text),
            score.role,
            f"{score.teacher:.2f}",
            f"{score.before:.2f}",
            f"{score.after:.2f}",
            f"{score.after / score.teacher:.3f}",
            f"{score.kl_before:.3f} → {score.kl_after:.3f}",
        )
    console = Console(highlight=False)
    console.print(table)
    blocks = "1 block" if len(report.blocks) == 1 else f"{len(report.blocks)} blocks"
    console.print(
        f"{report.linears} linears in {blocks}, {report.trained / 1e6:.2f} M parameters trained on "
        f"{report.tokens:,} tokens ({report.distinct_tokens:,} distinct), best after step {report.best_step} of "
        f"{report.steps}"
    )
    console.print(
        f"{sum(report.cpu_seconds.values()):.0f} s of CPU time, peak memory {report.peak_rss_bytes / 1e6:.0f} MB; the "
        f"report is {output / 'recover_report.json'}"
    )
