"""Largest |value| of what flows between cores: calibration text once through the model, block by block, in PyTorch.

One block is in memory at a time, its factorised linears as matrices; what flows between the cores of a linear is
recomputed from the linear's input, in the order of `network.best_orders`.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixt_export import network
from mixt_export.checkpoints import Checkpoint
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.texts import calibration_windows, default_texts
from mixt_export.network import Branch, FactorizedLinear, Order, best_orders
from mixt_export.network.order import steps
from mixt_export.passes.balance import state_name
from mixt_export.progress import SILENT, Progress

WINDOWS, LENGTH = 8, 128


def intermediate_maxima(
    checkpoint: Checkpoint,
    texts: Sequence[Path] = (),
    *,
    windows: int = WINDOWS,
    length: int = LENGTH,
    keep_inputs: int = 0,
    progress: Progress = SILENT,
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """Maxima for `Balance`, and the first ``keep_inputs`` inputs (tokens, in) of each factorised linear.

    ``texts``: UTF-8 files (default: the shipped calibration texts); ``windows`` windows of ``length`` tokens. Raises
    UnsupportedError for encoders and models that cannot be run block by block, CheckpointError without a tokenizer.
    """
    model = _Blocks(checkpoint)
    tokens, _ = calibration_windows(checkpoint.path, texts or default_texts(), windows, length, model.vocabulary)
    maxima: dict[str, NDArray[np.float32]] = {}
    inputs: dict[str, list[NDArray[np.float32]]] = {}
    hidden = model.embed(tokens, np.empty((*tokens.shape, model.hidden), np.float32))
    with progress.task("measuring intermediates", model.blocks) as advance, torch.inference_mode():
        for index in range(model.blocks):
            with model.block(index) as layer, ExitStack() as hooks:
                for name, module in _factorised(model, index, layer):
                    hooks.callback(
                        module.register_forward_hook(_listen(model, name, maxima, inputs, keep_inputs)).remove
                    )
                for window in range(len(tokens)):
                    hidden[window] = model.run(layer, index, hidden[window][None])[0]
            advance(1)
    kept = {name: np.concatenate(rows)[:keep_inputs] for name, rows in inputs.items() if rows}
    return maxima, kept


class _Blocks(BlockwiseModel):
    """Blocks whose factorised linears are loaded as their matrices."""

    def _read(self, name: str, meta: torch.Tensor) -> torch.Tensor:
        linear = self.checkpoint.factors.get(name.removesuffix(".weight"))
        if linear is None:
            return super()._read(name, meta)
        return torch.from_numpy(network.densify(linear, self.checkpoint.store.read).astype(np.float32))


def _factorised(model: _Blocks, index: int, layer: Any) -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_modules():
        full = f"{model.block_path(index)}.{name}"
        if full in model.checkpoint.factors:
            yield full, module


def _listen(
    model: _Blocks,
    name: str,
    maxima: dict[str, NDArray[np.float32]],
    inputs: dict[str, list[NDArray[np.float32]]],
    keep: int,
) -> Any:
    linear, store = model.checkpoint.factors[name], model.checkpoint.store
    cores = {core.name: store.read(core.name, "float32") for core in linear.core_tensors()}

    def hook(_module: Any, given: Any, _output: Any) -> None:
        x = given[0].detach().float().reshape(-1, linear.in_features).numpy()
        if sum(map(len, inputs.setdefault(name, []))) < keep:
            inputs[name].append(x.copy())
        for key, state in states(linear, cores, x):
            most = np.abs(state).max(axis=0, initial=0.0)
            maxima[key] = most if key not in maxima else np.maximum(maxima[key], most)

    return hook


def states(
    linear: FactorizedLinear, cores: dict[str, NDArray[Any]], x: NDArray[Any]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every intermediate of ``linear`` for x (tokens, in): its name and value (tokens, *labels of the state).

    The last of each branch is its unscaled output in the order of the contraction.
    """
    for number, (branch, order) in enumerate(zip(linear.branches, best_orders(linear), strict=True)):
        for step, state in enumerate(_walk(linear, branch, order, cores, x)):
            yield state_name(linear.name, number, step), state


def _walk(
    linear: FactorizedLinear, branch: Branch, order: Order, cores: dict[str, NDArray[Any]], x: NDArray[Any]
) -> Iterator[NDArray[Any]]:
    state = np.pad(x, ((0, 0), (0, branch.in_size - linear.in_features)))
    state = state.reshape(len(x), *(size for _, size in branch.in_modes))
    labels: Sequence[str] = [label for label, _ in branch.in_modes]
    letter = dict(zip(branch.sizes(), string.ascii_letters, strict=False))
    for index, (_, after) in zip(order, steps(branch, order), strict=True):
        core = branch.cores[index]
        left, right, result = ("".join(letter[label] for label in group) for group in (labels, core.labels, after))
        state = np.asarray(np.einsum(f"...{left},{right}->...{result}", state, cores[core.tensor.name], optimize=True))
        labels = after
        yield state
