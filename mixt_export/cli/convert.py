"""`mixt convert`: rewrite a model folder in our own format, or in one that other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixt_export.cli.base import BaseOption, use_base

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="Model folder in any format that is read.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="mixt (our own), ablinear (LowRankArena) or svd-llm.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", show_default=False)],
    base: BaseOption = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Keep a LoRA adapter as a branch of its linears, unmerged.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder this tool wrote.")] = False,
) -> None:
    """Rewrite a model folder in another format, tensor by tensor."""
    from mixt_export.checkpoints.convert import convert as run
    from mixt_export.cli.draw import RichProgress

    use_base(base)
    done = run(model, output, to, keep_adapter=keep_adapter, overwrite=overwrite, progress=RichProgress())
    typer.echo(f"wrote {done.path}: {done.source} → {done.target}, {done.linears} factorised linears")
