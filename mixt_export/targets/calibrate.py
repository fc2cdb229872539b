"""The activation-aware part of a quantised export: rounding by calibration, and what the model loses by it."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mixt_export.errors import UsageError
from mixt_export.families.rope import turned_together
from mixt_export.lower.quantised import QuantisedMatrix
from mixt_export.progress import Progress
from mixt_export.quantisation import Blocks
from mixt_export.quantisation.cache import CacheScales, measure_cache
from mixt_export.quantisation.calibration import Target, calibrate, logits_of
from mixt_export.quantisation.smoothing import Smoothing, measure_smoothing
from mixt_export.targets.quantise import QuantisedPlan

if TYPE_CHECKING:
    from mixt_export.targets.export import ExportPlan

#: Tokens that calibration runs: windows times their length. More changed the loss by less than its noise.
WINDOWS, WINDOW = 16, 256
#: Windows of each evaluation text by which the loss is measured.
_LOSS_WINDOWS, _LOSS_WINDOW = 1, 256
_LAST_POSITION = "/lm_head/last_position"


def why_nearest(plan: QuantisedPlan, source: Path) -> str:
    """Why this export is rounded to nearest, or an empty string when it is to be calibrated.

    Raises UsageError where calibration was asked for and cannot be done.
    """
    settings = plan.settings
    if settings.rounding == "nearest":
        return "asked for"
    missing = next((name for name in ("onnxruntime", "tokenizers") if importlib.util.find_spec(name) is None), None)
    reason = f"{missing} is not installed" if missing else ""
    if not reason and not (source / "tokenizer.json").is_file():
        reason = "the model folder has no tokenizer.json"
    if settings.rounding == "calibrated":
        if reason:
            raise UsageError(f"--rounding calibrated: {reason}; choose --rounding nearest.")
        return ""
    return reason or ("at 8 bits calibration gains nothing" if settings.bits == 8 else "")


class FloatGraph:
    """The graph of ``plan``, which is not quantised, with logits of every position, and its weights by name.

    ``smoothing``: its weights are smoothed, so that it computes the same.
    """

    def __init__(self, plan: ExportPlan, smoothing: Smoothing | None = None) -> None:
        self._smoothing = smoothing
        self.positions = plan.max_seq_len
        ropes = [block.attention.rope for block in plan.decoder.blocks]
        self.turned = [turned_together(rope) if rope is not None else [] for rope in ropes]
        self.model = _every_position(ir.serde.serialize_model(plan.lowered.model))
        self._readers = {
            name: plan.lowered.weights.reader(value.const_value)
            for name, value in plan.lowered.model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }

    def read(self, name: str) -> NDArray[Any]:
        """The value of an initializer in the graph's layout."""
        value: NDArray[Any] = self._readers[name]()
        return value if self._smoothing is None else self._smoothing.applied(name, value)

    def windows(self, source: Path, texts: Sequence[Path]) -> list[NDArray[np.int64]]:
        """Tokens of ``texts``, or of the shipped ones. Raises UsageError, CheckpointError where they give none."""
        from mixt_export.compression.texts import calibration_windows, default_texts

        length, vocabulary = min(WINDOW, self.positions), _vocabulary(self.model)
        return list(calibration_windows(source, texts or default_texts(), WINDOWS, length, vocabulary)[0])

    def matrix(self, matrix: QuantisedMatrix) -> NDArray[Any]:
        """The values (rows, columns) of a matrix that is quantised."""
        value = self.read(matrix.name)
        return value.T if matrix.transposed else value


def _every_position(model: onnx.ModelProto) -> onnx.ModelProto:
    picker = next(node for node in model.graph.node if node.name == _LAST_POSITION)
    picked, everything = picker.output[0], picker.input[0]
    model.graph.node.remove(picker)
    for node in model.graph.node:
        node.input[:] = [everything if name == picked else name for name in node.input]
    return model


def calibrate_cache(
    graph: FloatGraph, scales: CacheScales, source: Path, texts: Sequence[Path], progress: Progress
) -> None:
    """Measure the range of keys and values on ``texts``. Raises UsageError without a tokenizer."""
    if not (source / "tokenizer.json").is_file():
        raise UsageError(f"--kv-cache int8: {source} has no tokenizer.json, so there is no text to measure ranges on.")
    measure_cache(graph.model, graph.read, graph.windows(source, texts), graph.turned, scales, progress=progress)


def calibrate_smoothing(
    graph: FloatGraph, smoothing: Smoothing, source: Path, texts: Sequence[Path], progress: Progress
) -> None:
    """Find the factors of ``smoothing`` on ``texts``. Raises UsageError without a tokenizer."""
    if not (source / "tokenizer.json").is_file():
        raise UsageError(
            f"--activations int8: {source} has no tokenizer.json, so there is no text to measure activations on."
        )
    measure_smoothing(graph.model, graph.read, graph.windows(source, texts), smoothing, progress=progress)


def calibrate_plan(
    graph: FloatGraph, plan: QuantisedPlan, source: Path, texts: Sequence[Path], folder: Path, progress: Progress
) -> tempfile.TemporaryDirectory[str]:
    """Round the matrices of ``plan`` by what they read; the blocks wait below ``folder`` until they are written.

    The folder that is returned is to be cleaned up behind the writing. Raises UsageError, CheckpointError for texts
    that give no tokens of the model, ResourceError where a block does not fit into memory.
    """
    windows = graph.windows(source, texts)
    scratch = tempfile.TemporaryDirectory(prefix=".rounding-", dir=folder)
    store = _Store(Path(scratch.name), plan)
    wide = plan.settings.bits == 8  # else calibration gains nothing at 8 bits, and was not asked for
    targets = {
        name: Target(m.bits, m.group, m.transposed, nearest=m.bits == 8 and not wide, scale_dtype=m.scale_dtype)
        for name, m in plan.matrices.items()
    }
    try:
        calibrate(graph.model, targets, graph.read, windows, store.keep, progress=progress)
    except BaseException:
        scratch.cleanup()
        raise
    plan.rounded.known = store.find
    return scratch


class _Store:
    """Blocks on disk, by name of their matrix."""

    def __init__(self, folder: Path, plan: QuantisedPlan) -> None:
        self._folder, self._plan = folder, plan
        self._places = {name: folder / f"{index}.npz" for index, name in enumerate(plan.matrices)}

    def keep(self, name: str, blocks: Blocks) -> None:
        np.savez(self._places[name], codes=blocks.codes, scales=blocks.scales)

    def find(self, name: str) -> Blocks | None:
        matrix, place = self._plan.matrices[name], self._places[name]
        if not place.is_file():
            return None
        with np.load(place) as held:
            return Blocks(held["codes"], held["scales"], matrix.bits, matrix.group)


def _vocabulary(model: onnx.ModelProto) -> int:
    logits = next(value for value in model.graph.output if value.name == "logits")
    return int(logits.type.tensor_type.shape.dim[-1].dim_value)


def measured_loss(graph: FloatGraph, folder: Path, progress: Progress) -> dict[str, Any] | None:
    """Perplexity of the float graph and of the one in ``folder`` on the evaluation texts, and the KL between them.

    The written graph runs as it is, roundings of activations included. None where the folder has no tokenizer.
    """
    from mixt_export.sample.texts import EVALUATION
    from mixt_export.verification.graph import open_graph
    from mixt_export.verification.metrics import kl_divergence, log_softmax
    from mixt_export.verification.session import ExportedRunner
    from mixt_export.verification.tokens import encode, open_tokenizer, read_text

    tokenizer = open_tokenizer(folder)
    if tokenizer is None:
        return None
    length = min(_LOSS_WINDOW, graph.positions)
    windows = [
        tokens[index * length : (index + 1) * length]
        for tokens in (encode(tokenizer, read_text(path)) for path in EVALUATION.values())
        for index in range(_LOSS_WINDOWS)
    ]
    windows = [window for window in windows if len(window) > 1 and window.max() < _vocabulary(graph.model)]
    if not windows:
        return None
    runner = ExportedRunner(open_graph(folder), all_positions=True)
    count, before, after, kl = 0, 0.0, 0.0, 0.0
    with progress.task("measuring what quantisation costs", len(windows)) as advance:
        for window, logits in zip(windows, logits_of(graph.model, graph.read, windows), strict=True):
            ours = runner.full(window).logits[0, :-1]
            rows = np.arange(len(window) - 1)
            before -= float(log_softmax(logits[:-1])[rows, window[1:]].sum())
            after -= float(log_softmax(ours)[rows, window[1:]].sum())
            kl += float(kl_divergence(logits[:-1], ours).sum())
            count += len(rows)
            advance(1)
    return {
        "tokens": count,
        "perplexity_before": math.exp(before / count),
        "perplexity": math.exp(after / count),
        "kl": max(kl, 0.0) / count,
    }
