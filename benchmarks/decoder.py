"""An exported decoder timed in place: IO binding, past and present in one buffer, thread CPU time of one thread."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnxruntime as ort


class Timed:
    """A graph with shared cache buffers; calls return seconds of this thread."""

    def __init__(self, folder: Path, heads: int, dim: int, capacity: int = 2048) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(folder / "model.onnx", options)
        self.binding = self.session.io_binding()
        self.layers = sum(value.name.endswith(".key") for value in self.session.get_inputs())
        shape = (1, heads, capacity, dim)
        self.cache = {
            f"{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for layer in range(self.layers)
            for part in ("key", "value")
        }

    def step(self, ids: np.ndarray, past: int) -> float:
        binding = self.binding
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, past + ids.shape[1]), np.int64))
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")
        began = time.thread_time()
        self.session.run_with_iobinding(binding)
        return time.thread_time() - began

    def decode(self, context: int, steps: int = 4) -> float:
        """Seconds per token at ``context`` tokens of cache."""
        one = np.array([[17]], np.int64)
        return sum(self.step(one, context + step) for step in range(steps)) / steps

    def prefill(self, tokens: int, chunk: int | None = None) -> float:
        """Seconds for ``tokens`` new tokens, in one call or in calls of ``chunk`` tokens over the same cache."""
        size = chunk or tokens
        ids = np.arange(5, 5 + tokens, dtype=np.int64)[None]
        return sum(self.step(np.ascontiguousarray(ids[:, at : at + size]), at) for at in range(0, tokens, size))
