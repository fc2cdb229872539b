"""Run an exported graph with ONNX Runtime: full passes, chunks and steps with a cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.errors import ResourceError, UsageError
from mixt_export.runtime import load_runtime
from mixt_export.verification.graph import LOGITS, MODEL_FILE, ExportedGraph, instrument, layer_outputs
from mixt_export.verification.rounding import rounding

Ids = NDArray[np.int64]
#: onnxruntime's severity "fatal": its errors reach the user as our sentence, not as log lines.
_QUIET = 4


def available_threads(threads: int) -> int:
    """``threads``, or half the cores this process may use when it is 0.

    PyTorch's threads wait for each other actively: as soon as another process wants one of all cores, runs on all of
    them take several times longer than on half.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or max(cores // 2, 1)


def session_options(graph: ExportedGraph, threads: int) -> Any:
    """Options with which a graph from memory finds its weights in the exported folder."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = available_threads(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Standard graphs of quantised weights say that products are of floats: fused products must not round activations.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    folder = str(graph.folder.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    if any(node.op_type == "DynamicQuantizeMatMul" for node in graph.proto.graph.node):
        load_runtime("ort").sum_exactly(options)
    return options


def start_session(graph: ExportedGraph, proto: onnx.ModelProto, threads: int, options: Any | None = None) -> Any:
    """An onnxruntime session of ``proto`` on the CPU, with the weights of ``graph``'s folder.

    A graph that rounds (see ExportedGraph.rounds) runs as `rounding` makes it: caches go in and come out as float32.
    Raises UsageError when onnxruntime refuses the graph, ResourceError when memory is short.
    """
    import onnxruntime as ort

    if graph.rounds:
        proto = rounding(proto, graph.dtype)
    try:
        return ort.InferenceSession(
            proto.SerializeToString(), options or session_options(graph, threads), providers=["CPUExecutionProvider"]
        )
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        text = " ".join(str(error).split())
        if "bad_alloc" in text or "Failed to allocate" in text:
            raise ResourceError(f"{graph.folder}: the model does not fit into this machine's memory.") from error
        raise UsageError(
            f"{graph.folder / MODEL_FILE}: onnxruntime {ort.__version__} refuses it: {text[:500]}"
        ) from error


@dataclass
class Step:
    """What one run gave: logits (batch, positions, vocab) float32, inner values asked for, the cache to go on from."""

    logits: NDArray[np.float32]
    layers: list[NDArray[Any]]
    cache: list[NDArray[Any]]


class ExportedRunner:
    """One session of an exported graph, plain or instrumented (see graph.instrument).

    ``layers``, ``values``: which inner values of the instrumented graph each Step holds, block outputs first.
    """

    def __init__(
        self,
        graph: ExportedGraph,
        threads: int = 0,
        *,
        all_positions: bool = False,
        layers: bool = False,
        values: Sequence[str] = (),
    ) -> None:
        self.graph = graph
        self._all_positions = all_positions
        self._layers = [*(layer_outputs(graph) if layers else []), *values]
        proto = instrument(graph, values=self._layers) if all_positions else graph.proto
        self._past = [f"past_key_values.{i}.{kind}" for i in range(graph.layers) for kind in ("key", "value")]
        self._present = [f"present.{i}.{kind}" for i in range(graph.layers) for kind in ("key", "value")]
        self.session = start_session(graph, proto, threads)
        #: Type of the cache as it is fed.
        self.element: Any = np.float16 if graph.dtype == "float16" and not graph.rounds else np.float32
        if graph.int8_cache:
            self.element = np.int8

    def empty_cache(self, batch: int, length: int = 0) -> list[NDArray[Any]]:
        """Zeros (batch, kv_heads, length, head_dim) for every key and value."""
        shape = (batch, self.graph.kv_heads, length, self.graph.head_dim)
        return [np.zeros(shape, self.element) for _ in self._past]

    def given(self, past: Sequence[NDArray[np.float32]]) -> list[NDArray[Any]]:
        """Keys and values as they are computed, of every block in turn, as the graph caches them."""
        kept = self.graph.smoothing
        return [
            (array / kept[name] if name in kept else array).astype(self.element)
            for name, array in zip(self._past, past, strict=True)
        ]

    def run(self, ids: Ids, mask: Ids, cache: list[NDArray[Any]] | None = None, *, want_cache: bool = False) -> Step:
        """One run: ``ids`` (batch, seq), ``mask`` (batch, past + seq)."""
        cache = self.empty_cache(len(ids)) if cache is None else cache
        feeds = {"input_ids": ids, "attention_mask": mask, **dict(zip(self._past, cache, strict=True))}
        wanted = [LOGITS, *self._layers, *(self._present if want_cache else [])]
        outputs = self._guarded(lambda: self.session.run(wanted, feeds))
        expected = (len(ids), ids.shape[1] if self._all_positions else 1)
        if outputs[0].shape[:-1] != expected:
            raise RunFailed(f"its logits are of shape {outputs[0].shape}, expected {(*expected, 'vocabulary')}")
        split = 1 + len(self._layers)
        return Step(outputs[0].astype(np.float32, copy=False), outputs[1:split], outputs[split:])

    def full(self, tokens: Ids) -> Step:
        """One sequence (seq,) from an empty cache."""
        return self.run(tokens[None, :], np.ones((1, len(tokens)), np.int64))

    def chunks(self, tokens: Ids, sizes: Sequence[int]) -> list[NDArray[np.float32]]:
        """Feed one sequence in chunks of ``sizes`` with the cache carried along; logits (vocab,) after each chunk."""
        cache, start, rows = None, 0, []
        for size in sizes:
            end = start + size
            step = self.run(tokens[None, start:end], np.ones((1, end), np.int64), cache, want_cache=True)
            rows.append(step.logits[0, -1])
            cache, start = step.cache, end
        return rows

    def shared_chunks(self, tokens: Ids, sizes: Sequence[int], capacity: int) -> list[NDArray[np.float32]]:
        """As ``chunks``, but past and present are one buffer of ``capacity`` positions, bound once.

        Single tokens come with a mask as long as the buffer, zeros behind what it holds, as the runner gives them.
        """
        import onnxruntime as ort

        buffers = [ort.OrtValue.ortvalue_from_numpy(array) for array in self.empty_cache(1, capacity)]
        start, rows = 0, []
        for size in sizes:
            end = start + size
            binding = self.session.io_binding()
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens[None, start:end]))
            mask = np.ones((1, end if size > 1 else capacity), np.int64)
            mask[:, end:] = 0
            binding.bind_cpu_input("attention_mask", mask)
            for past, present, buffer in zip(self._past, self._present, buffers, strict=True):
                binding.bind_ortvalue_input(past, buffer)
                binding.bind_ortvalue_output(present, buffer)
            binding.bind_output(LOGITS)
            self._guarded(lambda bound=binding: self.session.run_with_iobinding(bound))
            rows.append(binding.get_outputs()[-1].numpy()[0, -1].astype(np.float32))
            start = end
        return rows

    def padded(self, sequences: Sequence[Ids]) -> tuple[Ids, Ids]:
        """A ragged batch as ids and mask (batch, longest): right-padded in dialect ort, left-padded in portable."""
        longest = max(len(sequence) for sequence in sequences)
        ids = np.zeros((len(sequences), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            where = self.valid(len(sequence), longest)
            ids[row, where], mask[row, where] = sequence, 1
        return ids, mask

    def valid(self, length: int, longest: int) -> slice:
        """Where a sequence of ``length`` lies in a row padded to ``longest``."""
        return slice(0, length) if self.graph.dialect == "ort" else slice(longest - length, longest)

    def grow(self, mask: Ids) -> Ids:
        """The mask after one more token for every sequence."""
        one = np.ones((len(mask), 1), np.int64)
        return np.concatenate([one, mask] if self.graph.dialect == "ort" else [mask, one], axis=1)

    def greedy(self, prompt: Ids, count: int) -> Ids:
        """The ``count`` most likely next tokens, one at a time with the cache."""
        step = self.run(prompt[None, :], np.ones((1, len(prompt)), np.int64), want_cache=True)
        produced: list[int] = []
        for index in range(count):
            produced.append(int(step.logits[0, -1].argmax()))
            if index + 1 == count:
                break
            mask = np.ones((1, len(prompt) + len(produced)), np.int64)
            step = self.run(np.array([[produced[-1]]], np.int64), mask, step.cache, want_cache=True)
        return np.array(produced, np.int64)

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise not_run(error) from error


class RunFailed(Exception):  # noqa: N818 (it is an outcome of a check, not an error of the tool)
    """The runtime did not run the graph, or gave another shape; a check that meets it has failed, with this reason."""


def not_run(error: Exception) -> RunFailed:
    """What ``error`` of the runtime means for a check."""
    return RunFailed(f"onnxruntime could not run it: {' '.join(str(error).split())[:500]}")
