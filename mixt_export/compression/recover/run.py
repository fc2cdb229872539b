"""recover(): from a factorised model folder and its dense teacher to the same folder with trained factors."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixt_export.checkpoints import Checkpoint, NewTensor, open_checkpoint, write_checkpoint
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.clock import Clock
from mixt_export.compression.memory import peak_rss
from mixt_export.compression.precision import fast_products
from mixt_export.compression.recover.data import Windows, cut
from mixt_export.compression.recover.pair import Pair, check_pair
from mixt_export.compression.recover.report import RecoverReport, Score
from mixt_export.compression.recover.settings import RecoverSettings, rate_for
from mixt_export.compression.recover.state import State, StateFolder
from mixt_export.compression.recover.tail import Head, Tail
from mixt_export.compression.recover.teacher import listen
from mixt_export.compression.recover.train import Measured, Trainer
from mixt_export.compression.run import REPORT_FILE as COMPRESS_REPORT
from mixt_export.compression.scratch import IN_MEMORY, scratch_beside
from mixt_export.compression.self_text import sampled_windows
from mixt_export.compression.texts import default_texts
from mixt_export.errors import UsageError
from mixt_export.progress import SILENT, Progress
from mixt_export.reference.tensors import torch_dtype
from mixt_export.resources import texts as shipped_texts
from mixt_export.staging import check_output, require_space, staged_folder

REPORT_FILE = "recover_report.json"


def recover(
    student_dir: str | Path,
    teacher_dir: str | Path,
    output: str | Path,
    *,
    texts: Sequence[str | Path] = (),
    eval_texts: Sequence[str | Path] | None = None,
    validation: Sequence[str | Path] = (),
    settings: RecoverSettings | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> RecoverReport:
    """Train the factors of ``student_dir`` to predict what the dense ``teacher_dir`` predicts, and write ``output``.

    Trained are all factors, the norms and biases of the blocks that hold them, and the final norm; everything in front
    is frozen and run once. The loss is KL(teacher ‖ student) per token on a part of the vocabulary (vocabulary.py).
    ``texts``: UTF-8 texts to train on, mixed evenly; the shipped calibration texts when empty. ``eval_texts``: measured
    before and after, never used otherwise; None: the shipped evaluation texts, where ``texts`` is empty.
    ``validation``: texts of other domains that choose the best step together with the ends of ``texts``; text that the
    teacher samples when empty (then the whole teacher is in memory for a moment).
    ``resume``: go on from ``<output>.recover``, where every check leaves its state. Equal arguments give equal bytes
    on one machine, interrupted or not.

    Memory: the blocks from the first factorised one on, with gradients and moments of what is trained, one teacher
    block, the output embedding, activations (beyond 1 GiB in mapped files). Raises UsageError, CheckpointError or
    UnsupportedError with one sentence; ``output`` appears whole or not at all.
    """
    inputs = (Path(student_dir), Path(teacher_dir))
    check_output(Path(output), overwrite=overwrite, inputs=inputs)
    chosen = _Texts.of(texts, eval_texts, validation)
    clock = Clock(time.process_time)
    with clock.stage("texts"):
        job = _prepare(student_dir, teacher_dir, output, chosen, settings or RecoverSettings(), seed, progress)
    state_folder = StateFolder(job.output, job.fingerprint)
    with scratch_beside(job.output) as scratch:
        stream = 4 * job.windows.tokens.size * job.model.hidden
        require_space(job.output, 2 * stream if stream > IN_MEMORY else 0, "the activations of recover")
        with clock.stage("teacher"), fast_products():
            head = Head(job.model)
            tail = Tail(job.pair, job.model)
            teacher = listen(job.model, head, job.windows, tail.first, job.settings, scratch, progress)
        trainer = Trainer(tail, head, teacher, job.windows, job.settings, seed, state_folder, progress)
        with clock.stage("measuring"):
            before = [trainer.measure(held) for held in job.windows.held]
        with clock.stage("training"):
            state = trainer.run(resume)
            _round(tail)
        with clock.stage("measuring"):
            after = [trainer.measure(held) for held in job.windows.held]
        report = _report(job, tail, state, before, after)
        with staged_folder(job.output, overwrite=overwrite, inputs=inputs) as staging:
            student = job.pair.student
            write_checkpoint(staging, student, _tensors(tail), student.factors, _info(student, report), progress)
            report = replace(report, cpu_seconds=clock.seconds, peak_rss_bytes=peak_rss())
            if (student.path / COMPRESS_REPORT).is_file():
                shutil.copyfile(student.path / COMPRESS_REPORT, staging / COMPRESS_REPORT)
            (staging / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    state_folder.remove()
    return report


@dataclass(frozen=True)
class _Job:
    """The checked arguments of one run."""

    pair: Pair
    model: BlockwiseModel
    output: Path
    windows: Windows
    settings: RecoverSettings
    seed: int

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the trained values depend on."""
        digest = hashlib.sha256(json.dumps([asdict(self.settings), self.seed]).encode())
        digest.update(self.windows.tokens.tobytes())
        for checkpoint in (self.pair.student, self.pair.teacher):
            digest.update(hashlib.sha256(checkpoint.config_bytes()).digest())
            for path in checkpoint.store.files:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Texts:
    """UTF-8 files: to train on, to choose the best step by, to measure."""

    training: tuple[Path, ...]
    validation: tuple[Path, ...]
    evaluation: tuple[Path, ...]

    @classmethod
    def of(
        cls, texts: Sequence[str | Path], evaluation: Sequence[str | Path] | None, validation: Sequence[str | Path]
    ) -> _Texts:
        """Shipped texts where none are given. Raises UsageError where a file is missing."""
        if evaluation is None:
            evaluation = [] if texts else sorted(shipped_texts().glob("eval_*.txt"))
        chosen = [*map(Path, texts)] or default_texts()
        found = cls(*(tuple(map(Path, paths)) for paths in (chosen, validation, evaluation)))
        for text in (*found.training, *found.validation, *found.evaluation):
            if not text.is_file():
                raise UsageError(f"{text}: no such text.")
        return found


def _prepare(
    student_dir: str | Path,
    teacher_dir: str | Path,
    output: str | Path,
    texts: _Texts,
    settings: RecoverSettings,
    seed: int,
    progress: Progress,
) -> _Job:
    if not 0 <= seed < 1 << 31:
        raise UsageError(f"--seed {seed}: give a whole number from 0 to {(1 << 31) - 1}.")
    student, teacher = open_checkpoint(student_dir), open_checkpoint(teacher_dir)
    model = BlockwiseModel(teacher)
    pair = check_pair(student, teacher, model)
    if settings.matrix_rate is None:
        settings = replace(settings, matrix_rate=rate_for(pair.kept, len(pair.blocks)))
    length = min(settings.window, int(getattr(model.model.config, "max_position_embeddings", settings.window)))
    sampled = None
    if settings.sampled and not texts.validation:
        sampled = sampled_windows(teacher, settings.sampled, length, seed, progress)
    windows = cut(
        student.path, texts.training, texts.validation, texts.evaluation, sampled, settings, length, model.vocabulary
    )
    return _Job(pair, model, Path(output), windows, settings, seed)


@torch.no_grad()
def _round(tail: Tail) -> None:
    """To what the dtypes store, in place: what is measured is what will be loaded."""
    for name, parameter in tail.parameters.items():
        parameter.copy_(parameter.to(torch_dtype(tail.dtype(name))))


def _tensors(tail: Tail) -> list[NewTensor]:
    """What was trained, in the dtypes it is stored in."""

    def item(name: str, parameter: torch.Tensor) -> NewTensor:
        values = parameter.detach().numpy()
        dtype = tail.dtype(name)
        return NewTensor(name, dtype, values.shape, lambda: np.ascontiguousarray(values.astype(numpy_dtype(dtype))))

    return [item(name, parameter) for name, parameter in tail.parameters.items()]


def _report(job: _Job, tail: Tail, state: State, before: list[Measured], after: list[Measured]) -> RecoverReport:
    settings, windows = job.settings, job.windows
    scores = tuple(
        Score(
            held.text,
            held.role,
            first.tokens,
            _perplexity(first.teacher_nll, first.tokens),
            _perplexity(first.student_nll, first.tokens),
            _perplexity(last.student_nll, last.tokens),
            first.kl / first.tokens,
            last.kl / last.tokens,
        )
        for held, first, last in zip(windows.held, before, after, strict=True)
    )
    length = windows.tokens.shape[1]
    return RecoverReport(
        teacher=str(job.pair.teacher.path),
        blocks=job.pair.blocks,
        linears=len(job.pair.linears),
        trained=sum(parameter.numel() for parameter in tail.parameters.values()),
        steps=state.step,
        best_step=state.best_step,
        tokens=state.step * min(settings.batch, windows.training) * length,
        distinct_tokens=windows.training * length,
        seed=job.seed,
        settings=asdict(settings),
        texts=windows.reports,
        checks=tuple(state.checks),
        scores=scores,
    )


def _perplexity(nll: float, tokens: int) -> float:
    return math.exp(min(nll / tokens, 700.0))


def _info(student: Checkpoint, report: RecoverReport) -> dict[str, Any]:
    """What the checkpoint records: what it did before, and the report without what differs between equal runs."""
    recovered = report.to_dict()
    del recovered["cpu_seconds"], recovered["peak_rss_bytes"]
    return {**student.info, "recover": recovered}
