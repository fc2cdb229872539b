"""Measure what flows into and back out of the linears of the dense model, or take it from the cache.

One forward pass, block by block, for Grams of the inputs; where gradients are asked for, one backward pass from the
last block to the first, each block run again from its stored input. In memory: one block, the activations at one
boundary, and the statistics of one block. On disk: block inputs of the windows that give gradients, and the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.compression.attended import HeadFisher, Value, listening_at_heads, mixed_gram, values_of
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.settings import Settings
from mixt_export.compression.statistics import Gram, InputGroup, listening, listening_to_gradients
from mixt_export.compression.statistics_cache import (
    Entry,
    StatisticsCache,
    array_digest,
    pack_symmetric,
    unpack_symmetric,
)
from mixt_export.compression.streams import batches, find_groups
from mixt_export.progress import Progress

#: What is measured at the linears' outputs: nothing, mean ||g||² of the gradient g, or the Fisher matrix mean g gᵀ.
NONE, TRACES, FISHER = "none", "traces", "fisher"

#: Windows that give traces: those of 32 differ by e^±0.11 in the root mean square (docs/compression.md).
TRACE_WINDOWS = 4


def gradient_windows(gradients: str, settings: Settings) -> int:
    """How many windows give gradients, at most."""
    return {NONE: 0, TRACES: min(TRACE_WINDOWS, settings.fisher_windows), FISHER: settings.fisher_windows}[gradients]


class Statistics:
    """The measured moments by module path of the linear, read one at a time; float32 precision.

    ``loss``: nats per token on the windows that gave gradients, NaN where none did.
    """

    def __init__(self, inputs: Entry | None, outputs: Entry | None) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._group: dict[str, str] = {} if inputs is None else json.loads(inputs.get("groups").tobytes())
        about: dict[str, Any] = {"traces": {}, "loss": math.nan}
        if outputs is not None:
            about = json.loads(outputs.get("traces").tobytes())
        self._traces: dict[str, float] = about["traces"]
        self.loss: float = about["loss"]

    def gram(self, name: str) -> torch.Tensor | None:
        """mean x xᵀ (in, in) of the linear's input; None where no text was read."""
        if self._inputs is None:
            return None
        return torch.from_numpy(unpack_symmetric(self._inputs.get(f"gram:{self._group[name]}")))

    def magnitude(self, name: str) -> torch.Tensor | None:
        """mean |x_j| (in,) of the linear's input; None where no text was read."""
        return None if self._inputs is None else torch.from_numpy(self._inputs.get(f"size:{self._group[name]}"))

    def fisher(self, name: str) -> torch.Tensor | None:
        """mean g gᵀ (out, out); None where only traces or nothing was measured."""
        if self._outputs is None or f"fisher:{name}" not in self._outputs:
            return None
        return torch.from_numpy(unpack_symmetric(self._outputs.get(f"fisher:{name}")))

    def trace(self, name: str) -> float | None:
        """mean ||g||²; None where no gradients were measured."""
        return None if self._outputs is None else self._traces[name]


class Gatherer:
    """Runs the passes. ``targets``: block index -> names of the targeted linears inside the block.

    ``windows`` (windows, length) int64; ``gradients``: NONE, TRACES or FISHER. ``attended``: value projections are
    measured behind the attention, see attended.py, on as many windows as give gradients: every head gives each a row.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        targets: Mapping[int, Sequence[str]],
        windows: np.ndarray[Any, Any],
        settings: Settings,
        scratch: Scratch,
        progress: Progress,
        cache: StatisticsCache,
        gradients: str,
        attended: bool = False,
    ) -> None:
        self.model, self.targets, self.windows, self.settings = model, targets, windows, settings
        self.attended = attended
        self.scratch, self.progress, self.cache, self.gradients = scratch, progress, cache, gradients
        self.gradient_windows = min(gradient_windows(gradients, settings), len(windows))

    @contextmanager
    def run(self) -> Iterator[Statistics]:
        """The statistics; they may be read while the block runs."""
        with ExitStack() as held:
            inputs = held.enter_context(self._entry("inputs", self.windows, 1))
            outputs = None
            if self.gradient_windows:
                outputs = held.enter_context(self._entry(self.gradients, self._covering, 0))
            missing = None if outputs is None or outputs.complete else outputs
            if missing is not None or not inputs.complete:
                self._measure(None if inputs.complete else inputs, missing)
            yield Statistics(inputs, outputs)

    @property
    def _covering(self) -> np.ndarray[Any, Any]:
        """The windows of all batches that hold windows with gradients.

        Batches are what rounding depends on: with these the backward pass sees the same numbers whether or not the
        forward pass went over the other windows too.
        """
        batch = self.settings.batch
        return self.windows[: -(-self.gradient_windows // batch) * batch]

    def _entry(self, kind: str, windows: np.ndarray[Any, Any], axis: int) -> Any:
        """The cache's entry of ``kind``; ``axis`` of the weights whose moments it holds."""
        facts: dict[str, Any] = {}
        if self.cache.folder is not None:
            facts = {
                "model": self.cache.model(self.model.checkpoint),
                "tokens": array_digest(windows),
                "gradients": self.gradient_windows if kind != "inputs" else 0,
                "targets": [f"{self.model.block_path(index)}.{name}" for index, name in self._linears()],
                "batch": self.settings.batch,
                "versions": self.cache.versions(),
                **({"attended": self.settings.fisher_windows} if self.attended else {}),
            }
        features = [self.model.linear_shape(f"{self.model.block_path(i)}.{name}")[axis] for i, name in self._linears()]
        needed = sum(4 if kind == TRACES else 2 * size * (size + 1) for size in features)
        return self.cache.entry(kind, facts, needed, self.scratch.folder)

    def _linears(self) -> Iterator[tuple[int, str]]:
        return ((index, name) for index, names in self.targets.items() for name in names)

    def _measure(self, inputs: Entry | None, outputs: Entry | None) -> None:
        windows = self.windows if inputs is not None else self._covering
        shape = (*windows.shape, self.model.hidden)
        hidden = self.model.embed(windows, self.scratch.working_array("stream", shape))
        groups: dict[str, str] = {}
        own: dict[str, str] = {}
        stop = self.model.blocks if outputs is not None else max(self.targets) + 1
        with self.progress.task("input statistics", stop) as advance:
            for index in range(stop):
                for window in range(self.gradient_windows if outputs is not None else 0):
                    self.scratch.put(f"in:{index}:{window}", hidden[window].numpy())
                with self.model.block(index) as layer:
                    names = self.targets.get(index, ()) if inputs is not None else ()
                    found = find_groups(self.model, layer, index, names)
                    for value in self._values(layer, names):
                        mixed = Gram(value.features)
                        mixed_gram(self.model, layer, index, value, hidden[: self.settings.fisher_windows], mixed)
                        own[f"{self.model.block_path(index)}.{value.name}"] = key = f"{index}:values"
                        assert inputs is not None
                        _keep(inputs, key, mixed)
                    grams = self._advance(layer, index, hidden, found)
                    for number, (group, gram) in enumerate(zip(found, grams, strict=True)):
                        assert inputs is not None
                        key = f"{index}:{number}"
                        _keep(inputs, key, gram)
                        groups |= {f"{self.model.block_path(index)}.{name}": key for name in group.linears}
                advance(1)
        if inputs is not None:
            inputs.put("groups", _encoded(groups | own))
            inputs.commit()
        if outputs is not None:
            self._backward(hidden[: self.gradient_windows].clone(), outputs)
            outputs.commit()

    def _values(self, layer: nn.Module, names: Sequence[str]) -> tuple[Value, ...]:
        return values_of(layer, names) if self.attended else ()

    @torch.no_grad()
    def _advance(self, layer: nn.Module, index: int, hidden: torch.Tensor, groups: Sequence[InputGroup]) -> list[Gram]:
        """Overwrite ``hidden`` by the block's output, gathering the Gram of each input group."""
        grams = [Gram(group.features) for group in groups]
        with listening(layer, groups, lambda group, x: grams[group].add(x)):
            for part in batches(len(hidden), self.settings.batch):
                hidden[part] = self.model.run(layer, index, hidden[part])
        return grams

    def _backward(self, last: torch.Tensor, outputs: Entry) -> None:
        """From the last block to the first: gradients at the linears' outputs."""
        tokens = self.windows[: self.gradient_windows]
        gradients, loss = self.model.loss_gradients(lambda window: last[window], tokens)
        traces: dict[str, float] = {}
        with self.progress.task("output statistics", self.model.blocks) as advance:
            for index in reversed(range(self.model.blocks)):
                with self.model.block(index) as layer:
                    for name, (trace, fisher) in self._backward_block(layer, index, gradients).items():
                        full = f"{self.model.block_path(index)}.{name}"
                        traces[full] = trace
                        if fisher is not None:
                            outputs.put(f"fisher:{full}", pack_symmetric(fisher.mean().float().numpy()))
                advance(1)
        outputs.put("traces", _encoded({"traces": traces, "loss": loss}))

    def _backward_block(
        self, layer: nn.Module, index: int, gradients: torch.Tensor
    ) -> dict[str, tuple[float, Gram | HeadFisher | None]]:
        """Overwrite ``gradients`` (at the block's output) by those at its input; mean ||g||² and Fisher matrix."""
        names = tuple(self.targets.get(index, ()))
        sums, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        full = names if self.gradients == FISHER else ()
        fisher: dict[str, Gram | HeadFisher] = {
            name: Gram(layer.get_submodule(name).out_features)  # type: ignore[arg-type]
            for name in full
        }
        values = self._values(layer, names)
        fisher |= {value.name: HeadFisher(value) for value in values if full}
        plain = tuple(name for name in names if name not in {value.name for value in values})

        def hear(name: str, gradient: torch.Tensor) -> None:
            sums[name] += float(gradient.double().square().sum())
            tokens[name] += len(gradient)  # of an expert: those sent to it
            if name in fisher:
                fisher[name].add(gradient)

        with listening_to_gradients(layer, plain, hear), listening_at_heads(layer, values, hear):
            for part in batches(len(gradients), self.settings.batch):
                stored = [self.scratch.get(f"in:{index}:{window}") for window in range(part.start, part.stop)]
                hidden = torch.from_numpy(np.stack(stored)).requires_grad_(True)
                output = self.model.run(layer, index, hidden)
                (gradients[part],) = torch.autograd.grad(output, hidden, gradients[part])
        for window in range(len(gradients)):
            self.scratch.drop(f"in:{index}:{window}")
        return {name: (sums[name] / max(1, tokens[name]), fisher.get(name)) for name in names}


def _keep(entry: Entry, key: str, gram: Gram) -> None:
    entry.put(f"gram:{key}", pack_symmetric(gram.mean().float().numpy()))
    entry.put(f"size:{key}", gram.magnitude().float().numpy())


def _encoded(value: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
