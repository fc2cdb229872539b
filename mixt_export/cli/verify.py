"""`mixt verify`: prove an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixt_export.cli.base import BaseOption, use_base

if TYPE_CHECKING:
    from mixt_export.verification import Report

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def verify(
    exported: Annotated[Path, typer.Argument(help="Folder that `mixt export` wrote.", show_default=False)],
    reference: Annotated[
        Path, typer.Option("--reference", "-r", help="Model folder it was made from; PyTorch float32 runs it.")
    ],
    base: BaseOption = None,
    prompts: Annotated[Path | None, typer.Option(help="UTF-8 file, one prompt per line.")] = None,
    positions: Annotated[
        int | None, typer.Option(help="Teacher-forced positions [256; 2048 with --thorough].", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences of the ragged batch.")] = 3,
    greedy_tokens: Annotated[
        int | None, typer.Option(help="Greedy tokens per prompt [32; 64 with --thorough].", show_default=False)
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Relative L2 of logits that passes [1e-5; at fp16 measured].", show_default=False),
    ] = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="More positions, more tokens.")] = False,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Predict memory, do not measure it.")] = False,
    threads: Annotated[int, typer.Option(help="Threads; 0 takes half the cores.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random choices.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print report.json instead of tables.")] = False,
) -> None:
    """Prove that an exported folder computes what PyTorch computes, and say what it needs.

    Writes report.json and report.html into the folder. Exit code 3 when parity fails.
    """
    from mixt_export.cli.draw import RichProgress
    from mixt_export.errors import ParityError
    from mixt_export.verification import VerifyOptions
    from mixt_export.verification import verify as run

    use_base(base)
    options = VerifyOptions(
        prompts=prompts,
        positions=positions,
        batch=batch,
        greedy_tokens=greedy_tokens,
        tolerance=tolerance,
        memory=not no_memory,
        threads=threads,
        seed=seed,
        thorough=thorough,
    )
    report = run(exported, reference, options=options, progress=RichProgress())
    if json_output:
        import json

        typer.echo(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        print_report(report)
    if not report.passed:
        raise typer.Exit(ParityError.exit_code)


def print_report(report: Report) -> None:
    """Print the checks, the memory and, as the last line, the verdict."""
    from rich.console import Console

    from mixt_export.verification.html import number

    console = Console(highlight=False)
    table = _table("check", "", "rel L2", "KL", "top-1", "positions")
    for check in report.checks:
        metrics = check.metrics
        table.add_row(
            check.title,
            "[green]passed[/green]" if check.passed else "[red]failed[/red]",
            *(number(metrics[key]) if key in metrics else "" for key in ("rel_l2", "kl")),
            number(metrics.get("top1", metrics.get("agreement", ""))),
            number(metrics.get("positions", metrics.get("tokens", ""))),
        )
    console.print(table)
    if report.memory:
        _show_memory(console, report.memory)
    for note in report.notes:
        typer.echo(note)
    for check in report.checks:
        if check.reason:
            typer.echo(f"{check.title}: {check.reason}")
    if report.dtype_cost:
        typer.echo(
            f"PyTorch float32 and PyTorch {report.dtype_cost.dtype} differ by rel-L2 {report.dtype_cost.rel_l2:.1e}."
        )
    if report.minimum_tolerance is None:
        typer.echo("no tolerance passes.")
    else:
        typer.echo(
            f"minimum tolerance that passes: rel-L2 {report.minimum_tolerance:.1e} "
            f"(asked: {report.tolerance:.1e}, {report.tolerance_origin})"
        )
    typer.echo(f"{report.exported}/report.html · {report.seconds:.1f} s")
    typer.echo(report.verdict())


def _show_memory(console: Any, memory: Any) -> None:
    from mixt_export.verification.html import size

    table = _table("predicted", "weights", "KV cache", "activations", "attention", "together")
    for label, found in (
        (f"prefill of {memory.prefill.seq}", memory.prefill),
        (f"step at {memory.decode.total}", memory.decode),
    ):
        parts = (found.weights, found.kv_cache, found.activations, found.workspace, found.sum)
        table.add_row(label, *(size(part) for part in parts))
    table.add_row("same model dense", size(memory.dense_weights))
    console.print(table)
    if memory.measured:
        table = _table("measured", "loaded", "ran", "anonymous", "peak")
        for kind, found in memory.measured.items():
            label = "ONNX Runtime" if kind == "exported" else "PyTorch float32"
            table.add_row(label, *(size(part) for part in (found.loaded, found.ran, found.anon, found.peak)))
        console.print(table)
    typer.echo(f"KV cache: {memory.decode.kv_bytes_per_token:,} bytes per token")


def _table(first: str, *others: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right" if name else "left")
    return table
