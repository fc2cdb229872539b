"""Record what PyTorch computes, so that a board can check its engine without PyTorch.

The reference is that of ``verify``: the model folder in PyTorch float32, one sequence at a time. Which error an engine
may make is measured as there, too: twice what PyTorch itself loses at the export's dtype.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.building.toolkit import toolkit
from mixt_export.checkpoints import Checkpoint
from mixt_export.progress import SILENT, Progress
from mixt_export.verification.tokens import PROMPTS, encode, open_tokenizer
from mixt_export.verification.torch_model import TorchModel

#: Prompts of ``verify`` that are recorded, and tokens decoded after each.
_CASES = 3
_STEPS = 6
_SEED = 20

#: An engine of a float32 graph may differ by the order of its sums; nothing was measured on a board.
_FLOAT32_TOLERANCE = 1e-4
#: Added to twice what the dtype costs PyTorch, in logits and in norms; used alone where PyTorch overflows.
_SLACK = 1e-4
_OVERFLOWING_TOLERANCE = 1e-2
#: An engine that puts out zeros has an error of 1.
_LARGEST_TOLERANCE = 0.5

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Run:
    """Logits (positions, vocab), norms of blocks (layers, positions) and of keys and values (layers, 2, positions)."""

    logits: Floats
    hidden: Floats
    cache: Floats


def record_golden(reference: Path | Checkpoint, exported: Path, output: Path, *, progress: Progress = SILENT) -> None:
    """Write golden.json and .npy files for the exported folder ``exported`` into the new folder ``output``.

    ``reference``: the model that it was exported from. Three sequences, each a prompt and the tokens that PyTorch
    chooses after it; random tokens where there is no tokenizer. Raises MissingDependencyError without torch or
    transformers.
    """
    manifest = toolkit("manifest").read_manifest(exported)
    golden = toolkit("golden")
    output.mkdir(parents=True)
    with progress.task("recording golden tensors", total=2 * _CASES) as advance:
        model = TorchModel(reference, layers=manifest.layers)
        prompts = _prompts(exported, model.vocab_size, manifest)
        steps = min(_STEPS, manifest.max_seq_len - 1)
        sequences = [_continued(model, prompt, steps) for prompt in prompts]
        runs = []
        for tokens in sequences:
            runs.append(_run(model, tokens))
            advance(1)
        tolerance = {"logits": _FLOAT32_TOLERANCE, "norms": _FLOAT32_TOLERANCE}
        if manifest.dtype != "float32":
            del model
            rounded = TorchModel(reference, dtype=manifest.dtype, layers=manifest.layers)
            tolerance = _tolerance(runs, [_run(rounded, tokens) for tokens in sequences])
        advance(_CASES)
    cases = []
    for index, (tokens, prompt, run) in enumerate(zip(sequences, prompts, runs, strict=True)):
        name = f"prompt{index}"
        arrays = {"logits": run.logits[len(prompt) - 1 :], "hidden": run.hidden, "cache": run.cache}
        for array in golden.ARRAYS:
            np.save(output / f"{name}.{array}.npy", np.ascontiguousarray(arrays[array]), allow_pickle=False)
        cases.append({"name": name, "prompt": len(prompt), "tokens": tokens.tolist()})
    facts = {
        "schema": golden.SCHEMA,
        "reference": "PyTorch float32",
        "graph": manifest.files["model.onnx"],
        "tolerance": tolerance,
        "cases": cases,
    }
    (output / golden.FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _prompts(exported: Path, vocab_size: int, manifest: Any) -> list[Ids]:
    room = max(1, manifest.max_seq_len - _STEPS)
    tokenizer = open_tokenizer(exported)
    if tokenizer is None:
        rng = np.random.default_rng(_SEED)
        return [rng.integers(0, vocab_size, min(length, room)) for length in range(5, 5 + 3 * _CASES, 3)]
    return [encode(tokenizer, prompt, special=True)[:room] for prompt in PROMPTS[:_CASES]]


def _continued(model: TorchModel, prompt: Ids, steps: int) -> Ids:
    """``prompt`` and the ``steps`` likeliest tokens after it."""
    tokens = prompt
    for _ in range(steps):
        tokens = np.append(tokens, model.logits(tokens)[-1].argmax())
    return tokens.astype(np.int64)


def _run(model: TorchModel, tokens: Ids) -> _Run:
    import torch
    from transformers import DynamicCache

    logits, blocks = model.hidden(tokens)
    with torch.inference_mode():  # a cache made by the model itself forgets what a sliding window has passed
        output = model.model(
            input_ids=torch.from_numpy(tokens[None, :].copy()), past_key_values=DynamicCache(), use_cache=True
        )
    layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
    norms = [[part[0].float().square().sum(dim=(0, 2)).sqrt().numpy() for part in layer] for layer in layers]
    hidden = np.stack([np.linalg.norm(block.astype(np.float64), axis=-1) for block in blocks])
    return _Run(logits, hidden.astype(np.float32), np.asarray(norms, np.float32))


def _tolerance(exact: list[_Run], rounded: list[_Run]) -> dict[str, float]:
    """Errors an engine may make: twice PyTorch's own at this dtype and a little."""
    pairs = list(zip(exact, rounded, strict=True))
    found = {
        "logits": [_relative(b.logits, a.logits) for a, b in pairs],
        "norms": [
            _relative(row, reference)
            for a, b in pairs
            for left, right in ((b.hidden, a.hidden), (b.cache, a.cache))
            for row, reference in zip(_rows(left), _rows(right), strict=True)
        ],
    }
    return {
        what: min(2 * max(errors) + _SLACK, _LARGEST_TOLERANCE) if np.isfinite(errors).all() else _OVERFLOWING_TOLERANCE
        for what, errors in found.items()
    }


def _rows(norms: Floats) -> Floats:
    return norms.reshape(-1, norms.shape[-1])


def _relative(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
