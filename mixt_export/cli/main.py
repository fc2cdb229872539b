"""The `mixt` command: one verb, one module. Modules are imported only when their verb is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from mixt_export.cli.guard import guarded

#: verb -> one-line help. The verb `x-y` lives in mixt_export/cli/x_y.py as the Typer app `app`.
VERBS = {
    "sample": "Fetch the sample model (SmolLM2-135M-Instruct) as a Hugging Face folder.",
    "compress": "Replace a model's linear layers by factors.",
    "recover": "Train a compressed model's factors against the dense model.",
    "export": "Write a (compressed) model as an ONNX folder and prove it. Also: mixt-export.",
    "verify": "Prove that an exported folder computes what PyTorch computes, and what it needs.",
    "build": "Build the TensorRT engine of an exported folder.",
    "run": "Complete one prompt with an exported folder.",
    "chat": "Talk to an exported folder.",
    "embed": "Sentence embeddings from an exported encoder.",
    "eval": "Perplexity of a model on a text; KL and agreement against another model.",
    "sweep": "Replace more and more of the last blocks, measure each model, find the transition.",
    "convert": "Rewrite a model folder in our own format, or in one that other tools load.",
    "inspect": "Say what a model folder or exported folder holds.",
    "calibrate-device": "Measure this machine's CPU, for the choice of executable forms.",
    "doctor": "Check this machine: versions, optional packages, memory, disk.",
}

_EPILOG = (
    "Exit codes: 0 ok · 1 internal error · 2 bad usage or input · 3 parity failed · 4 unsupported · "
    "5 will not fit (memory, disk) · 6 missing dependency · 130 interrupted."
)


class LazyGroup(TyperGroup):
    """Lists verbs from the table and imports a verb's module only when it is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All verbs, in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the module of ``cmd_name``; for a help page only its one-line help is needed."""
        if cmd_name not in VERBS:
            return None
        if getattr(ctx, "listing", False):
            return _stub(cmd_name)
        return load_verb(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Render the help page from the table alone."""
        ctx.listing = True
        super().format_help(ctx, formatter)


def _stub(verb: str) -> Any:
    from typer.core import TyperCommand

    return TyperCommand(verb, help=VERBS[verb], callback=None)


def load_verb(verb: str) -> Any:
    """The click command of ``verb``."""
    command: Any = typer.main.get_command(importlib.import_module(f"mixt_export.cli.{verb.replace('-', '_')}").app)
    command.name = verb
    return command


root = typer.Typer(
    cls=LazyGroup,
    help="Compile, export and prove tensor-compressed language models for edge devices.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@root.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from mixt_export import __version__

        typer.echo(f"mixt-export {__version__}")
        raise typer.Exit


def mixt() -> None:
    """Entry point of `mixt`."""
    sys.exit(guarded(typer.main.get_command(root), "mixt"))


def mixt_export() -> None:
    """Entry point of `mixt-export`, the same as `mixt export`."""
    sys.exit(guarded(load_verb("export"), "mixt-export"))
