"""What is looked up, not computed: the embedding of every token, the angles or vector of every position.

The texts of the other checks use a part of the vocabulary and the first positions; a row they do not use may be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mixt_export.verification.context import Context
from mixt_export.verification.graph import feeding, read_constant
from mixt_export.verification.locate import EMBEDDINGS
from mixt_export.verification.lookups import rotary_tables
from mixt_export.verification.result import CheckResult
from mixt_export.verification.rounding_unit import TINY, UNIT
from mixt_export.verification.session import not_run, start_session

NAME = "tables"
TITLE = "All tokens and positions"
_PREFIX = "/model/embed_tokens/"
#: Tokens of one run; models that look positions up are given each of theirs.
_CHUNK = 2048
#: Roundings of the table, of a multiplier, of a sum, and as many of PyTorch.
_ROUNDINGS = 8.0


def applies(context: Context) -> bool:
    """Whether the embedding can be told from the rest of the graph."""
    return any(node.name.startswith(_PREFIX) for node in context.graph.proto.graph.node)


def run(context: Context) -> CheckResult:
    """Compare row by row, so that a single wrong row is not hidden by the others."""
    wrong, worst = _wrong_tokens(context)
    reason = where = part = ""
    if len(wrong):
        reason = f"the embedding of {len(wrong)} of {context.torch.vocab_size} tokens differs, first of {wrong[0]}"
        where = EMBEDDINGS
    tables = list(_wrong_tables(context))
    broken = [text for text in tables if text]
    if broken and not reason:
        reason, where, part = broken[0], EMBEDDINGS, "rotary table"
    metrics = {
        "tokens": context.torch.vocab_size, "wrong_tokens": len(wrong), "worst_row_rel_l2": worst,
        "rotary_tables": len(tables),
    }  # fmt: skip
    return CheckResult(NAME, TITLE, not reason, reason, where, dict(metrics), part=part)


def _wrong_tokens(context: Context) -> tuple[list[int], float]:
    """Tokens whose first vector is wrong, and the largest relative L2 of all; each chunk begins at position 0."""
    graph, dtype = context.graph, context.graph.dtype
    value = [node for node in graph.proto.graph.node if node.name.startswith(_PREFIX)][-1].output[0]
    proto = feeding(graph.proto, value)
    inputs = {entry.name for entry in proto.graph.input}
    context.close()
    session = start_session(graph, proto, context.options.threads)
    chunk = min(context.max_length, _CHUNK)
    vocabulary = np.arange(max(context.torch.vocab_size, chunk), dtype=np.int64) % context.torch.vocab_size
    wrong: list[int] = []
    worst = 0.0
    for start in range(0, len(vocabulary), chunk):
        ids = vocabulary[start : start + chunk]
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
        try:
            found = session.run([value], {name: array for name, array in feeds.items() if name in inputs})[0]
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise not_run(error) from error
        errors, bars, norms = _rows(found[0], context.torch.embedded(ids), dtype)
        wrong += ids[~(errors <= bars)].tolist()
        ratios = errors / np.maximum(norms, 1e-30)
        worst = max(worst, float(np.max(np.where(np.isfinite(ratios), ratios, np.inf))))
    return wrong, worst


def _rows(
    found: NDArray[np.floating], expected: NDArray[np.float32], dtype: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Error, allowed error and norm of every row (rows, hidden)."""
    norms = np.linalg.norm(expected.astype(np.float64), axis=-1)
    with np.errstate(invalid="ignore"):  # NaN bits of any kind
        errors = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    bars = _ROUNDINGS * (UNIT[dtype] * norms + TINY[dtype] * np.sqrt(expected.shape[-1]))
    return errors, bars, norms


def _wrong_tables(context: Context) -> Iterator[str]:
    """Per rotary table of the graph: which position is wrong, or an empty string."""
    graph = context.graph
    constants = {tensor.name: tensor for tensor in graph.proto.graph.initializer}
    pairs = [name.removesuffix("/cos") for name in constants if name.startswith("/rotary") and name.endswith("/cos")]
    for prefix in pairs:
        cos, sin = (
            read_constant(graph.folder, constants[f"{prefix}/{part}"]).astype(np.float64) for part in ("cos", "sin")
        )
        known = rotary_tables(context.torch, len(cos))
        if not known:
            continue
        # A unit in the last place of a frequency moves the angle at position p by p units.
        bar = _ROUNDINGS * (UNIT[graph.dtype] + UNIT["float32"] * np.arange(len(cos))[:, None])
        rows = [
            np.flatnonzero(
                ~((np.abs(cos - c[:, : cos.shape[1]]) <= bar) & (np.abs(sin - s[:, : sin.shape[1]]) <= bar)).all(axis=1)
            )
            for c, s in known
            if min(c.shape[1], s.shape[1]) >= cos.shape[1]
        ]
        best = min(rows, key=len, default=None)
        yield (
            f"{prefix} is wrong at {len(best)} of {len(cos)} positions, first at {best[0]}"
            if best is not None and len(best)
            else ""
        )
