"""sweep(): compress afresh for every number of blocks, measure, keep a row."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixt_export import __version__
from mixt_export.checkpoints import Checkpoint, open_checkpoint
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.memory import release_freed
from mixt_export.compression.recover.run import recover
from mixt_export.compression.recover.settings import RecoverSettings
from mixt_export.compression.run import compress, plan
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.self_text import SELF
from mixt_export.errors import MissingDependencyError, UnsupportedError
from mixt_export.progress import SILENT, Progress
from mixt_export.reference import load_reference
from mixt_export.sample.fetch import sha256_file
from mixt_export.staging import require_space
from mixt_export.sweep.figures import Size, make_row, transitions
from mixt_export.sweep.front import unchanged_blocks
from mixt_export.sweep.material import Material, prepare
from mixt_export.sweep.measure import Decoder, Measured, Probe
from mixt_export.sweep.options import SweepOptions, Variant, compress_arguments, parse_counts
from mixt_export.sweep.plot import draw
from mixt_export.sweep.record import FILE, Record, check_folder, damaged
from mixt_export.verification.session import available_threads


@dataclass(frozen=True)
class SweepResult:
    """``data``: what sweep.json at ``path`` holds; ``plots``: the files drawn (none without matplotlib).

    ``measured`` rows are new, ``kept`` were there already.
    """

    path: Path
    data: dict[str, Any]
    plots: tuple[Path, ...]
    measured: int
    kept: int


def sweep(
    model_dir: str | Path, output: str | Path, options: SweepOptions | None = None, *, progress: Progress = SILENT
) -> SweepResult:
    """Replace the last N_B blocks of the dense ``model_dir`` for every N_B and variant, measure each, write ``output``.

    Each model is made afresh from the dense one in a temporary folder inside ``output`` and removed when measured.
    ``output/sweep.json`` is written whole after every row; rows that are there already with equal settings are kept,
    so an interrupted sweep goes on and a finished one grows by more N_B or variants. sweep.png and sweep.svg are drawn
    at the end where matplotlib is installed.
    Raises UsageError, CheckpointError, UnsupportedError, ResourceError or MissingDependencyError with one sentence,
    before anything is compressed where it can be known.
    """
    asked = options or SweepOptions()
    checkpoint, folder = open_checkpoint(model_dir), Path(output).absolute()
    if checkpoint.factors:
        raise UnsupportedError(f"{checkpoint.path}: is factorised already; sweep the dense model it was made from.")
    check_folder(folder)
    counts = parse_counts(asked.blocks, BlockwiseModel(checkpoint).blocks)
    variants = asked.variants()
    for variant in variants:
        plan(model_dir, folder / "model", **compress_arguments(asked, variant, counts[-1]))
    material = prepare(checkpoint, asked, progress)
    record = Record.open(folder, _settings(checkpoint, asked, material), overwrite=asked.overwrite)
    try:
        transitions(record)
    except (KeyError, TypeError, ValueError, IndexError) as error:  # somebody has edited the rows
        raise damaged(folder / FILE) from error
    pending = [(variant, count) for variant in variants for count in counts[1:] if not record.has(variant, count)]
    had, missing = len(record.rows), len(pending) + (not record.has(None, 0))
    if missing:
        torch.set_num_threads(available_threads(asked.threads))
        with _work_folder(folder) as work:
            _Sweep(checkpoint, asked, material, record, work, progress).run(pending)
    derived = transitions(record)
    record.write(derived)
    data = record.to_dict(derived)
    return SweepResult(folder / FILE, data, _draw(data, folder, progress), missing, had)


class _Sweep:
    """The loop over the rows that are missing."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: SweepOptions,
        material: Material,
        record: Record,
        work: Path,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._options, self._material = checkpoint, options, material
        self._record, self._work, self._progress = record, work, progress
        self._size = _size(checkpoint)
        scratch = work / "scratch"
        scratch.mkdir()
        self._probe = Probe(material, Scratch(scratch), progress)
        self._path, self._blocks = "", 0

    def run(self, pending: list[tuple[Variant, int]]) -> None:
        """Measure the dense model, then every pending row."""
        copies = 2 if self._options.recover_steps else 1
        require_space(self._work, copies * self._size.nbytes, "the compressed models of a sweep")
        dense = self._dense(pending)
        with self._progress.task("sweep", len(pending)) as advance:
            for variant, count in pending:
                self._row(variant, count, dense)
                advance(1)

    def _dense(self, pending: list[tuple[Variant, int]]) -> Measured:
        began = time.process_time()
        model = load_reference(self._checkpoint.path, attn="sdpa")
        decoder = Decoder(model)
        self._path, self._blocks = decoder.path, decoder.blocks
        entries = {self._blocks - count for _, count in pending}
        del decoder
        measured = self._probe.dense(model, entries)
        del model
        _free()
        if not self._record.has(None, 0):
            seconds = {"measure": time.process_time() - began}
            row = make_row(None, 0, self._size, self._size, measured, measured, self._material, seconds)
            self._record.add(row, transitions(self._record))
        return measured

    def _row(self, variant: Variant, count: int, dense: Measured) -> None:
        seconds: dict[str, float] = {}
        with tempfile.TemporaryDirectory(prefix="model-", dir=self._work) as name:
            folder = Path(name) / "model"
            with _clocked(seconds, "compress"):
                arguments = compress_arguments(self._options, variant, count)
                compress(self._checkpoint.path, folder, progress=self._progress, evaluate=False, **arguments)
            if self._options.recover_steps:
                with _clocked(seconds, "recover"):
                    folder = self._recover(folder)
            with _clocked(seconds, "measure"):
                student = open_checkpoint(folder)
                unchanged = unchanged_blocks(self._checkpoint, student, self._path, self._blocks)
                model = load_reference(folder, attn="sdpa")
                measured = self._probe.student(model, unchanged)
                size = _size(student)
                del model, student
                _free()
        row = make_row(variant, count, size, self._size, measured, dense, self._material, seconds)
        self._record.add(row, transitions(self._record))

    def _recover(self, student: Path) -> Path:
        """The recovered ``student``, in a folder beside it; the first is removed."""
        output = student.with_name("recovered")
        recover(
            student,
            self._checkpoint.path,
            output,
            texts=[text for text in self._options.calib if text != SELF],
            eval_texts=(),
            settings=RecoverSettings(steps=self._options.recover_steps),
            seed=self._options.seed,
            progress=self._progress,
        )
        shutil.rmtree(student)
        return output


def _settings(checkpoint: Checkpoint, options: SweepOptions, material: Material) -> dict[str, Any]:
    """Everything that the figures of a row depend on beside the variant and the number of blocks."""
    return {
        "model": checkpoint.path.name,
        "model_sha256": _digest(checkpoint),
        "mixt_export": __version__,
        "method": options.method,
        "refine_steps": options.refine_steps,
        "recover_steps": options.recover_steps,
        "calibration": [Path(text).name if not Path(text).is_file() else _named(Path(text)) for text in options.calib],
        "calibration_windows": options.calib_windows,
        "seed": options.seed,
        **material.description,
    }


def _named(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": sha256_file(path)}


def _digest(checkpoint: Checkpoint) -> str:
    """Hex sha256 of config.json's bytes and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(checkpoint.config_bytes())
    for name in sorted(checkpoint.store):
        ref = checkpoint.store[name].ref
        digest.update(f"{name} {ref.dtype} {ref.shape}".encode())
        for piece in checkpoint.store.chunks(name):
            digest.update(piece)
    return digest.hexdigest()


def _size(checkpoint: Checkpoint) -> Size:
    tensors = [stored.ref for stored in checkpoint.store.values()]
    return Size(sum(tensor.size for tensor in tensors), checkpoint.store.nbytes)


def _draw(data: dict[str, Any], folder: Path, progress: Progress) -> tuple[Path, ...]:
    try:
        return draw(data, folder)
    except MissingDependencyError as error:
        progress.note(f"no plot was drawn: {error}")
        return ()


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside ``folder``, which is made and, when nothing was put into it, removed again."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
            yield Path(work)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextmanager
def _clocked(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.process_time()
    yield
    seconds[stage] = time.process_time() - began


def _free() -> None:
    gc.collect()
    release_freed()
