"""The folder around the graph: every file is the one that was written, and what it says of the graph is true."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import open_checkpoint
from mixt_export.checkpoints.strictjson import load_optional
from mixt_export.verification.context import Context
from mixt_export.verification.facts import claims, genai_claims, length_claims, profile_claims
from mixt_export.verification.graph import MODEL_FILE
from mixt_export.verification.result import CheckResult

NAME = "files"
TITLE = "Files and manifest"
#: What an export writes itself; a model folder may hold a graph of its own under the same names.
_OWN = frozenset({MODEL_FILE, f"{MODEL_FILE}.data"})


def applies(context: Context) -> bool:
    """Whether our exporter wrote the graph; others need not leave a manifest."""
    written = any(entry.key == "mixt.version" for entry in context.graph.proto.metadata_props)
    return written or bool(context.manifest)


def run(context: Context) -> CheckResult:
    """Digests, weight files and companions against the model folder's, the manifest's facts against the graph's."""
    problems = list(_problems(context))
    reason = problems[0] if problems else ""
    if len(problems) > 1:
        reason += f" (and {len(problems) - 1} more)"
    files = context.manifest.get("files")
    count = len(files) if isinstance(files, dict) else 0
    return CheckResult(NAME, TITLE, not reason, reason, metrics={"files": count, "problems": len(problems)})


def _problems(context: Context) -> Iterator[str]:
    manifest = context.manifest
    if not manifest:
        yield "the folder has no mixt_manifest.json"
        return
    yield from _weight_files(context)
    yield from _companions(context)
    for what, said, true in claims(context.graph, manifest, context.reference, context.config):
        if said != true:
            yield f"mixt_manifest.json says {what} {said}, which is {true}"
    for what, positions, promised in length_claims(context.graph, manifest, context.config):
        if promised > positions:
            yield f"mixt_manifest.json promises {promised} positions, {what} has {positions}"
    genai = load_optional(context.exported / "genai_config.json")
    for what, said, true in genai_claims(genai, manifest) if genai else ():
        if said != true:
            yield f"genai_config.json says {what} {said}, the manifest {true}"
    trt = manifest.get("trt")
    for what, admitted in profile_claims(trt, manifest) if isinstance(trt, dict) else ():
        if not admitted:
            yield f"no profile of mixt_manifest.json admits {what}"


def _weight_files(context: Context) -> Iterator[str]:
    """Graph and weight files against their recorded digests, and those of the model folder against the original."""
    files = context.manifest.get("files")
    recorded = files if isinstance(files, dict) else {}
    named = {entry.value for tensor in context.graph.proto.graph.initializer for entry in tensor.external_data
             if entry.key == "location"}  # fmt: skip
    for name in sorted({"model.onnx", *named} - recorded.keys()):
        yield f"mixt_manifest.json records no digest of {name}"
    for name, facts in recorded.items():
        path, original = context.exported / name, context.reference / name
        if Path(name).name != name or not path.is_file() or not isinstance(facts, dict):
            yield f"mixt_manifest.json names {name!r}, which is no file of the folder"
            continue
        found = _digest(path)
        if found != facts.get("sha256") or path.stat().st_size != facts.get("bytes"):
            yield f"{name} is not the file that mixt_manifest.json describes (SHA-256 differs)"
        elif name not in _OWN and original.is_file() and not original.samefile(path) and _digest(original) != found:
            yield f"{name} differs from the model folder's"


def _companions(context: Context) -> Iterator[str]:
    """Tokenizer, generation settings, licence: copied byte for byte; JSON may be written differently."""
    checkpoint = open_checkpoint(context.reference)
    for original in (context.reference / "config.json", *checkpoint.companions()):
        copy = context.exported / original.name
        if not original.is_file():
            continue
        if not copy.is_file():
            yield f"{original.name} of the model folder is missing"
        elif copy.read_bytes() != original.read_bytes():
            as_read = dict(checkpoint.config) if original.name == "config.json" else None
            if original.suffix != ".json" or _json(copy) not in (_json(original), as_read):
                yield f"{original.name} differs from the model folder's"


def _json(path: Path) -> Any:
    """The JSON in ``path``; its bytes where it is none."""
    content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
