"""`mixt doctor`: check this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mixt_export.doctor import Findings

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")] = False,
) -> None:
    """Check this machine: versions, optional packages, processor, memory, disk.

    Exit code 6 when a core package is missing, 0 otherwise.
    """
    from mixt_export.doctor import examine
    from mixt_export.errors import MissingDependencyError

    findings = examine(Path.cwd())
    typer.echo(json.dumps(findings.as_dict(), indent=2) if as_json else _text(findings))
    if findings.missing_core:
        names = " ".join(findings.missing_core)
        raise MissingDependencyError(f"core packages are missing: pip install {names}.")


def _text(findings: Findings) -> str:
    rows = [
        ("mixt-export", findings.mixt_export),
        ("Python", findings.python),
        ("system", findings.system),
        ("processor", findings.cpu),
        ("features", " ".join(findings.cpu_features) or "unknown"),
        ("cores", f"{findings.physical_cores or 'unknown'} physical to use, {findings.logical_cores} logical"),
        ("memory", f"{_gigabytes(findings.memory_available)} available of {_gigabytes(findings.memory_total)}"),
        *(("disk free", f"{_gigabytes(free)} in {place}") for place, free in findings.disks.items()),
        ("hardlinks", "work here" if findings.hardlinks else "do not work here: exports copy the weights"),
        ("providers", " ".join(findings.onnxruntime_providers) or "none"),
        ("sample model", _sample(findings)),
        *((f"data {kind}", "found" if found else "MISSING") for kind, found in findings.resources.items()),
    ]
    lines = [f"{label:<13} {value}" for label, value in rows]
    lines.append("packages")
    for package in findings.packages:
        extra = f" [{package.extra}]" if package.extra else ""
        state = package.version or f"missing{'' if extra else ' (needed)'}: {package.install}"
        lines.append(f"  {package.name + extra:<28} {state}")
    return "\n".join(lines)


def _sample(findings: Findings) -> str:
    if findings.sample_complete:
        return f"in {findings.sample_folder}"
    return "not fetched yet: mixt sample"


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
