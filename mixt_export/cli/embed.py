"""`mixt embed`: sentence embeddings from an exported encoder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def embed(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder written by `mixt export` from an encoder.")],
    text: Annotated[list[str] | None, typer.Argument(help="Sentences. Default: the lines of standard input.")] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Print the cosine of every pair instead of the embeddings.")
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: onnxruntime's choice.")] = None,
) -> None:
    """Embed sentences: one JSON line each, {"text", "embedding"}, the embedding of length 1."""
    from mixt_export.errors import UsageError
    from mixt_export.runtime import load_runtime

    texts = list(text or ())
    if not texts:
        if sys.stdin.isatty():
            raise UsageError("there is no sentence; give some behind the folder, or pipe lines in.")
        texts = [line.strip() for line in sys.stdin if line.strip()]
    for number, sentence in enumerate(texts, start=1):
        if any("\ud800" <= letter <= "\udfff" for letter in sentence):
            raise UsageError(f"sentence {number} is not UTF-8; write it as UTF-8 text.")
    if similarity and len(texts) < 2:
        raise UsageError(
            f"--similarity compares sentences with each other, and there are {len(texts)}; give two or more."
        )
    runtime = load_runtime("ort_encoder")
    try:
        vectors = runtime.Encoder(folder, threads=threads).embed(texts)
    except runtime.EncoderError as error:
        raise UsageError(str(error)) from error
    if similarity:
        for row, first in enumerate(texts):
            for column in range(row + 1, len(texts)):
                typer.echo(f"{float(vectors[row] @ vectors[column]):.4f}  {first!r}  {texts[column]!r}")
        return
    for sentence, vector in zip(texts, vectors, strict=True):
        embedding = [round(float(value), 7) for value in vector]
        typer.echo(json.dumps({"text": sentence, "embedding": embedding}, ensure_ascii=False))
