"""compress(): from a dense model folder to a factorised one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixt_export.checkpoints import Checkpoint, NewTensor, open_checkpoint, write_checkpoint
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.compression import ranks as allocation
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.memory import peak_rss
from mixt_export.compression.method import RANK_RULES, SEQUENTIAL, Method, choose_objective, get_method
from mixt_export.compression.profile import LinearProfile, Profiler
from mixt_export.compression.ranks import Candidate, Ranks
from mixt_export.compression.report import CompressionReport, LayerReport, TextReport
from mixt_export.compression.scratch import IN_MEMORY, Scratch, scratch_beside
from mixt_export.compression.self_text import SELF, sampled_windows
from mixt_export.compression.sequential import SequentialCompressor
from mixt_export.compression.settings import Settings
from mixt_export.compression.targets import select
from mixt_export.compression.texts import calibration_windows, default_texts, open_tokenizer
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.network import FactorizedLinear, TensorRef, build
from mixt_export.progress import SILENT, Progress
from mixt_export.reference.tensors import torch_dtype
from mixt_export.staging import check_output, require_space, staged_folder

REPORT_FILE = "compress_report.json"


@dataclass(frozen=True)
class Plan:
    """What a run would do, known from headers alone. Sizes in bytes, ``budget`` and ``dense`` in parameters."""

    method: str
    objective: str
    ranks: str
    targets: tuple[str, ...]
    dense: int
    budget: int
    calibration: tuple[str, ...]
    scratch_bytes: int


@dataclass(frozen=True)
class _Job:
    """The checked arguments of one run."""

    checkpoint: Checkpoint
    output: Path
    method: Method
    objective: str
    keep: float
    rule: str
    texts: tuple[Path | str, ...]
    targets: tuple[str, ...]
    settings: Settings
    seed: int
    dtype: str | None

    @property
    def sequential(self) -> bool:
        return self.objective in SEQUENTIAL

    @property
    def needs_tokens(self) -> bool:
        return self.method.fisher or self.objective != "input-agnostic"

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a targeted linear."""
        out_features, in_features = self.checkpoint.store.find(f"{name}.weight").ref.shape
        return out_features, in_features

    def candidates(self, profiles: Mapping[str, LinearProfile]) -> list[Candidate]:
        return [
            profiles[name].candidate if name in profiles else Candidate(name, *self.shape(name), np.zeros(0))
            for name in self.targets
        ]


def compress(
    model_dir: str | Path,
    output: str | Path,
    *,
    method: str = "gfw-svd",
    keep: float = 0.9,
    calib: Sequence[str | Path] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ranks: str | Path = "auto",
    objective: str | None = None,
    settings: Settings | None = None,
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> CompressionReport:
    """Replace the linears of the decoder blocks of ``model_dir`` by low-rank factors and write ``output``.

    ``keep``: parameters kept in the targeted linears (factors, plus those that stay dense) over their dense parameters.
    ``calib``: UTF-8 texts, mixed evenly, or "self" for text the model itself samples; the shipped texts when empty.
    ``include``/``exclude``: regular expressions searched in module paths. ``ranks``: "auto" (the method's own rule),
    "uniform", "water-filling" or the path of a JSON file. ``objective``: see method.OBJECTIVES; None: the method's own.
    ``dtype``: of the factors; that of each source weight when None. Equal arguments give equal bytes on one machine.

    Peak memory is bounded by one block (two for sequential objectives), the embedding, and the activations at one
    block boundary; "self" also holds the whole model while it samples. Raises UsageError, CheckpointError,
    UnsupportedError or ResourceError with one sentence; ``output`` appears whole or not at all.
    """
    job, model = _prepare(
        model_dir, output, method, keep, calib, include, exclude, ranks, objective, settings, dtype, seed
    )
    check_output(job.output, overwrite=overwrite, inputs=(job.checkpoint.path,))
    clock = _Clock()
    with scratch_beside(job.output) as scratch:
        require_space(job.output, _scratch_bytes(job), "the temporary statistics of compress")
        with clock.stage("calibration text"):
            windows, texts = _windows(job, model, progress)
        with clock.stage("statistics"):
            profiles = _profile(job, model, windows, scratch, progress)
        with clock.stage("ranks"):
            chosen = _allocate(job, profiles)
        with clock.stage("sequential"):
            measured = _sequential(job, model, windows, chosen, scratch, progress)
        layers = _layers(job, profiles, chosen, measured)
        with staged_folder(job.output, overwrite=overwrite, inputs=(job.checkpoint.path,)) as staging:
            report = _report(job, layers, texts, clock)
            with clock.stage("writing"):
                factors, tensors = _factors(job, chosen, scratch)
                write_checkpoint(staging, job.checkpoint, tensors, factors, _info(report), progress)
            report = replace(report, seconds=clock.seconds, peak_rss_bytes=peak_rss())
            (staging / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    return report


def plan(
    model_dir: str | Path,
    output: str | Path,
    *,
    method: str = "gfw-svd",
    keep: float = 0.9,
    calib: Sequence[str | Path] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ranks: str | Path = "auto",
    objective: str | None = None,
    settings: Settings | None = None,
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Plan:
    """Check the arguments of ``compress`` and say what it would do; reads no weights, writes nothing."""
    job, _ = _prepare(model_dir, output, method, keep, calib, include, exclude, ranks, objective, settings, dtype, seed)
    check_output(job.output, overwrite=overwrite, inputs=(job.checkpoint.path,))
    dense = sum(candidate.dense_cost for candidate in job.candidates({}))
    return Plan(
        job.method.name,
        job.objective,
        job.rule,
        job.targets,
        dense,
        int(job.keep * dense),
        tuple(str(text) for text in job.texts),
        _scratch_bytes(job),
    )


def _prepare(
    model_dir: str | Path,
    output: str | Path,
    method: str,
    keep: float,
    calib: Sequence[str | Path],
    include: Sequence[str],
    exclude: Sequence[str],
    ranks: str | Path,
    objective: str | None,
    settings: Settings | None,
    dtype: str | None,
    seed: int,
) -> tuple[_Job, BlockwiseModel]:
    """Check everything that can be checked before a weight is read."""
    known = get_method(method)
    objective = choose_objective(known, objective)
    if not 0.0 < keep <= 1.0:
        raise UsageError(f"--keep {keep:g} is not a share; give a number above 0 and up to 1, such as 0.9.")
    if dtype is not None:
        torch_dtype(dtype)
    checkpoint = open_checkpoint(model_dir)
    if checkpoint.factors:
        raise UnsupportedError(f"{checkpoint.path}: is factorised already; compress the dense model it was made from.")
    model = BlockwiseModel(checkpoint)
    targets = tuple(select(model.linears(), include, exclude))
    rule = known.ranks if str(ranks) == "auto" else str(ranks)
    job = _Job(checkpoint, Path(output), known, objective, keep, rule, (), targets, settings or Settings(), seed, dtype)
    for name in targets:
        checkpoint.store.find(f"{name}.weight")
    if rule not in RANK_RULES:
        allocation.from_file(Path(rule), job.candidates({}))
    if job.needs_tokens:
        texts = tuple(SELF if str(text) == SELF else Path(text) for text in calib) or tuple(default_texts())
        open_tokenizer(checkpoint.path)
        for text in texts:
            if isinstance(text, Path) and not text.is_file():
                raise UsageError(f"{text}: no such calibration text.")
        job = replace(job, texts=texts)
    return job, model


def _windows(
    job: _Job, model: BlockwiseModel, progress: Progress
) -> tuple[np.ndarray[Any, Any], tuple[TextReport, ...]]:
    """Calibration windows (windows, length) int64: the texts' and, in place of "self", sampled ones, interleaved."""
    if not job.needs_tokens:
        return np.zeros((0, 0), dtype=np.int64), ()
    settings = job.settings
    longest = int(getattr(model.model.config, "max_position_embeddings", settings.window))
    length = min(settings.window, longest)
    files = [text for text in job.texts if isinstance(text, Path)]
    own = len(job.texts) - len(files)
    sampled = settings.windows * own // len(job.texts)
    parts: list[np.ndarray[Any, Any]] = []
    reports: list[TextReport] = []
    if files:
        windows, texts = calibration_windows(
            job.checkpoint.path, files, settings.windows - sampled, length, model.vocabulary
        )
        parts.append(windows)
        reports.extend(texts)
    if sampled:
        windows, text = sampled_windows(job.checkpoint, sampled, length, job.seed, progress)
        parts.append(windows)
        reports.append(text)
    order = sorted(
        ((position + 0.5) / len(part), number, position)
        for number, part in enumerate(parts)
        for position in range(len(part))
    )
    return np.stack([parts[number][position] for _, number, position in order]), tuple(reports)


def _by_block(job: _Job, model: BlockwiseModel) -> dict[int, list[str]]:
    """Block index -> targeted linears by their name inside the block."""
    found: dict[int, list[str]] = {}
    for index in range(model.blocks):
        prefix = model.block_path(index) + "."
        inside = [name.removeprefix(prefix) for name in job.targets if name.startswith(prefix)]
        if inside:
            found[index] = inside
    return found


def _profile(
    job: _Job, model: BlockwiseModel, windows: np.ndarray[Any, Any], scratch: Scratch, progress: Progress
) -> dict[str, LinearProfile]:
    """Spectra and factors under the dense model; nothing where only the sequential pass is needed."""
    if job.sequential and not job.method.fisher and job.rule != "water-filling":
        return {}
    profiler = Profiler(
        model,
        _by_block(job, model),
        windows,
        _max_ranks(job),
        job.settings,
        scratch,
        progress,
        input_aware=job.objective != "input-agnostic",
        fisher=job.method.fisher,
    )
    return profiler.run()


def _max_ranks(job: _Job) -> dict[str, int]:
    """How many directions each linear may turn out to need."""
    candidates = job.candidates({})
    if job.rule == "water-filling":
        return {candidate.name: candidate.max_rank for candidate in candidates}
    return {name: rank or 0 for name, rank in _allocate(job, {}).items()}


def _allocate(job: _Job, profiles: Mapping[str, LinearProfile]) -> Ranks:
    candidates = job.candidates(profiles)
    if job.rule == "uniform":
        return allocation.uniform(candidates, job.keep)
    if job.rule == "water-filling":
        return allocation.water_filling(candidates, job.keep, job.settings.rank_floor)
    return allocation.from_file(Path(job.rule), candidates)


def _sequential(
    job: _Job,
    model: BlockwiseModel,
    windows: np.ndarray[Any, Any],
    ranks: Ranks,
    scratch: Scratch,
    progress: Progress,
) -> SequentialCompressor | None:
    if not job.sequential:
        return None

    def fisher(name: str) -> torch.Tensor | None:
        return torch.from_numpy(scratch.get(f"fisher:{name}")) if job.method.fisher else None

    compressor = SequentialCompressor(
        model,
        _by_block(job, model),
        windows,
        ranks,
        job.settings,
        scratch,
        progress,
        anchored=job.objective == "anchored",
        fisher=fisher,
    )
    compressor.run()
    return compressor


def _layers(
    job: _Job,
    profiles: Mapping[str, LinearProfile],
    ranks: Ranks,
    measured: SequentialCompressor | None,
) -> tuple[LayerReport, ...]:
    layers = []
    for name in job.targets:
        out_features, in_features = job.shape(name)
        rank = ranks[name]
        if measured is not None:
            tail, error = measured.tails[name], measured.errors[name]
        elif rank is None:
            tail, error = 0.0, 0.0
        else:
            profile = profiles[name]
            tail = float(profile.candidate.loss[rank:].sum())
            error = float(profile.error[rank:].sum()) / profile.energy if profile.energy > 0 else 0.0
        params = out_features * in_features if rank is None else rank * (out_features + in_features)
        layers.append(
            LayerReport(
                name,
                out_features,
                in_features,
                "dense" if rank is None else "low_rank",
                rank,
                params,
                params / (out_features * in_features),
                tail,
                error,
            )
        )
    return tuple(layers)


def _factors(job: _Job, ranks: Ranks, scratch: Scratch) -> tuple[dict[str, FactorizedLinear], list[NewTensor]]:
    """The IR of every factorised linear and its cores, produced from the scratch when they are written."""
    factors: dict[str, FactorizedLinear] = {}
    tensors: list[NewTensor] = []
    for name, rank in ranks.items():
        if rank is None:
            continue
        out_features, in_features = job.shape(name)
        dtype = job.dtype or job.checkpoint.store[f"{name}.weight"].ref.dtype
        linear = build.low_rank(name, in_features, out_features, rank, dtype=dtype, method=job.method.name)
        if f"{name}.bias" in job.checkpoint.store:
            linear = replace(linear, bias=job.checkpoint.store[f"{name}.bias"].ref)
        factors[name] = linear
        first, second = (core.tensor for core in linear.branches[0].cores)
        tensors.append(_new_tensor(first, scratch, f"down:{name}", np.s_[:rank]))
        tensors.append(_new_tensor(second, scratch, f"up:{name}", np.s_[:, :rank]))
    return factors, tensors


def _new_tensor(ref: TensorRef, scratch: Scratch, key: str, kept: Any) -> NewTensor:
    """A core: the kept directions of a stored factor, transposed to the layout of the IR."""

    def produce() -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(scratch.get(key)[kept].T).astype(numpy_dtype(ref.dtype))

    return NewTensor(ref.name, ref.dtype, ref.shape, produce)


def _report(
    job: _Job, layers: tuple[LayerReport, ...], texts: tuple[TextReport, ...], clock: _Clock
) -> CompressionReport:
    before = sum(layer.out_features * layer.in_features for layer in layers)
    after = sum(layer.params for layer in layers)
    whole = sum(stored.ref.size for stored in job.checkpoint.store.values())
    return CompressionReport(
        method=job.method.name,
        objective=job.objective,
        ranks=job.rule,
        keep_asked=job.keep,
        keep_achieved=after / before,
        linears_params_before=before,
        linears_params_after=after,
        model_params_before=whole,
        model_params_after=whole - before + after,
        seed=job.seed,
        settings=asdict(job.settings),
        layers=layers,
        texts=texts,
        seconds=clock.seconds,
    )


def _info(report: CompressionReport) -> dict[str, Any]:
    """What the checkpoint records: the report without what differs between equal runs."""
    info = report.to_dict()
    del info["seconds"], info["peak_rss_bytes"]
    return info


def _scratch_bytes(job: _Job) -> int:
    """Disk for factors at full length, Fisher matrices, Grams and block inputs, float32: an upper estimate."""
    shapes = [job.shape(name) for name in job.targets]
    factors = sum(out_features * in_features for out_features, in_features in shapes)
    hidden = int(job.checkpoint.config.get("hidden_size", 0))
    stream = job.settings.windows * job.settings.window * hidden
    streams = 2 * stream if 4 * stream > IN_MEMORY else 0
    if not job.method.fisher:
        return 4 * (factors + streams)
    squares = sum(out_features**2 + in_features**2 for out_features, in_features in shapes)
    config = job.checkpoint.config
    boundary = job.settings.fisher_windows * job.settings.window * hidden
    return 4 * (factors + squares + streams + boundary * int(config.get("num_hidden_layers", 0)))


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - started, 3)
