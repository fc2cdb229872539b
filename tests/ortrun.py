"""Run an exported graph with plain ONNX Runtime calls, for tests: no IO binding, no runtime of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort


class Graph:
    """One session over ``folder``/model.onnx; caches travel as plain arrays."""

    def __init__(self, folder: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(folder / "model.onnx", options)
        self.past_names = [i.name for i in self.session.get_inputs() if i.name.startswith("past")]
        first = next(i for i in self.session.get_inputs() if i.name == self.past_names[0])
        self.heads, self.dim = first.shape[1], first.shape[3]
        self.dtype = np.float16 if first.type == "tensor(float16)" else np.float32

    def empty(self, batch: int) -> list[np.ndarray]:
        return [np.zeros((batch, self.heads, 0, self.dim), self.dtype) for _ in self.past_names]

    def run(
        self, ids: np.ndarray, past: list[np.ndarray] | None = None, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """(batch, vocab) logits of the last position and the new cache."""
        past = self.empty(len(ids)) if past is None else past
        if mask is None:
            mask = np.ones((len(ids), past[0].shape[2] + ids.shape[1]), np.int64)
        feed = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": mask,
            **dict(zip(self.past_names, past, strict=True)),
        }
        logits, *present = self.session.run(None, feed)
        assert logits.shape[1] == 1
        return logits[:, 0], present


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error in float64."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
