"""`mixt chat`: talk to an exported folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

_HELP = "/reset forgets the conversation · /exit or Ctrl-D leaves · Ctrl-C stops an answer"


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder written by `mixt export`.")],
    system: Annotated[str | None, typer.Option("--system", help="System text.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.2,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens of this total mass.")] = 0.9,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw from this many likeliest tokens; 0: all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="Above 1: avoid repeats.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: physical cores.")] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Keep weights only in the mapped file: less memory, slower.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Speed and memory on stderr.")] = True,
) -> None:
    """Talk to an exported folder. Lines may also be piped in: one line, one question.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer.
    """
    from mixt_export.errors import UsageError
    from mixt_export.runtime import Conversation, open_model, runtime_errors

    runtime, model, tokenizer = open_model(folder, threads=threads, low_memory=low_memory)
    if tokenizer.chat_template is None:
        raise UsageError(f"{folder}: the model has no chat template; use `mixt run --raw` instead.")
    with runtime_errors(runtime):
        sampler = runtime.Sampler(temperature, top_p, top_k, seed, repetition_penalty)
    conversation = Conversation(model, tokenizer, sampler, max_tokens=max_tokens, system=system)
    if sys.stdin.isatty():
        typer.echo(_HELP, err=True)
    for line in _lines():
        if line.startswith("/"):
            if line == "/exit":
                return
            if line == "/reset":
                conversation.reset()
            else:
                typer.echo(f"{line}: unknown command. {_HELP}", err=True)
            continue
        try:
            _answer(conversation, line)
        except runtime.OrtRuntimeError as error:
            typer.echo(f"\nerror: {error} (/reset starts anew)", err=True)
            continue
        if stats:
            typer.echo(conversation.stats.line(), err=True)


def _lines() -> Iterator[str]:
    """Stripped, non-empty lines: from a terminal with a prompt and line editing, else from standard input."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    _enable_line_editing()
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo(f"\n{_HELP}", err=True)
            continue
        if line:
            yield line


def _enable_line_editing() -> None:
    """Give input() arrow keys and history where the platform has readline."""
    try:
        import readline  # noqa: F401  # importing it is what changes input()
    except ModuleNotFoundError:
        return


def _answer(conversation: Any, text: str) -> None:
    """Print the answer as it comes; Ctrl-C ends it and keeps what was said."""
    from mixt_export.runtime import say

    with _interrupt_flag() as interrupted, closing(conversation.ask(text)) as pieces:
        for piece in pieces:
            say(piece)
            if interrupted:
                break
    say("\n")


@contextmanager
def _interrupt_flag() -> Iterator[list[int]]:
    """Within the block Ctrl-C fills the yielded list instead of raising in the middle of a model run."""
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, previous)
