"""The tiny decoder again, in plain float64 numpy loops over the whole sequence: no cache, no padding, no ONNX."""

from __future__ import annotations

import numpy as np

from tests.runtimes.build_tiny import Shape


def all_logits(shape: Shape, weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits (len(ids), vocab) float64 of one sequence."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    length, size = len(ids), shape.head_dim
    x = w["embed"][ids]
    for i in range(shape.layers):
        a = _rms(x, w[f"{i}.norm1"], shape.eps)
        queries = (a @ w[f"{i}.q"]).reshape(length, shape.heads, size)
        keys = (a @ w[f"{i}.k"]).reshape(length, shape.kv_heads, size)
        values = (a @ w[f"{i}.v"]).reshape(length, shape.kv_heads, size)
        mixed = np.zeros((length, shape.heads, size))
        for head in range(shape.heads):
            source = head // (shape.heads // shape.kv_heads)
            q = np.stack([_rope(queries[t, head], t, shape.theta) for t in range(length)])
            k = np.stack([_rope(keys[t, source], t, shape.theta) for t in range(length)])
            for t in range(length):
                scores = k[: t + 1] @ q[t] / np.sqrt(size)
                weight = np.exp(scores - scores.max())
                mixed[t, head] = weight / weight.sum() @ values[: t + 1, source]
        x = x + mixed.reshape(length, -1) @ w[f"{i}.o"]
        b = _rms(x, w[f"{i}.norm2"], shape.eps)
        gate = b @ w[f"{i}.gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (b @ w[f"{i}.up"])) @ w[f"{i}.down"]
    return _rms(x, w["norm"], shape.eps) @ w["head"]


def greedy(shape: Shape, weights: dict[str, np.ndarray], prompt: list[int], count: int, stop: int) -> list[int]:
    """Greedy continuation by full recomputation; ends before ``stop``."""
    ids, out = list(prompt), []
    for _ in range(count):
        token = int(all_logits(shape, weights, ids)[-1].argmax())
        if token == stop:
            break
        ids.append(token)
        out.append(token)
    return out


def _rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _rope(vector: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Rotate the pairs (d, d + half) as complex numbers (Su et al. 2021, half-split layout)."""
    half = vector.size // 2
    turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])
