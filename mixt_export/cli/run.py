"""`mixt run`: complete one prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder written by `mixt export`.")],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt. Default: standard input.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Use the model's chat template, or not. Default: if it has one."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System text, with a chat template.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Stop after this many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens of this total mass.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw from this many likeliest tokens; 0: all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="Above 1: avoid repeats.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: physical cores.")] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Keep weights only in the mapped file: less memory, slower.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Speed and memory on stderr.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")] = False,
) -> None:
    """Complete one prompt with an exported folder; the text goes to stdout as it is made."""
    from mixt_export.errors import UsageError
    from mixt_export.runtime import open_model, prompt_ids, runtime_errors, say

    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("there is no prompt; give one with -p, or pipe it in.")
        prompt = sys.stdin.read()
    runtime, model, tokenizer = open_model(folder, threads=threads, low_memory=low_memory)
    with runtime_errors(runtime):
        sampler = runtime.Sampler(temperature, top_p, top_k, seed, repetition_penalty)
        ids = prompt_ids(model, tokenizer, prompt, chat=chat, system=system)
        generation = model.generate(ids, max_tokens, sampler)
        stream = tokenizer.stream()
        tokens: list[int] = []
        pieces: list[str] = []
        for token in generation:
            tokens.append(token)
            pieces.append(stream.push(token))
            if not as_json:
                say(pieces[-1])
        pieces.append(stream.finish())
    if as_json:
        result = {
            "text": "".join(pieces),
            "prompt_token_ids": ids,
            "token_ids": tokens,
            "finish_reason": generation.finish_reason,
            "stats": generation.stats.as_dict(),
        }
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    say(pieces[-1] + "\n")
    if stats:
        typer.echo(generation.stats.line(), err=True)
