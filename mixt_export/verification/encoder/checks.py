"""What an exported encoder must get right: sequences alone, in a padded batch, with a second segment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from mixt_export.verification.checks import redensified
from mixt_export.verification.encoder.context import Batch, EncoderContext
from mixt_export.verification.encoder.totals import Totals, unit_mean
from mixt_export.verification.result import CheckResult, Metric
from mixt_export.verification.session import Ids, RunFailed


def _alone(context: EncoderContext) -> Totals:
    """Every sequence in a run of its own; the blocks' errors are gathered here."""
    totals = Totals()
    for tokens in context.sequences:
        states, embedding, layers = context.run(Batch(tokens[None, :], np.ones((1, len(tokens)), np.int64)))
        wanted, expected_layers = context.expected(tokens)
        totals.add(states[0], wanted, embedding[0], unit_mean(wanted))
        context.layers.add([layer[0] for layer in layers], expected_layers)
    return totals


def _padded(context: EncoderContext) -> Totals:
    """Sequences of different lengths in one run, padded on the right: each must get what it gets alone."""
    rng = np.random.default_rng(context.options.seed)
    stream = np.concatenate(context.sequences)
    longest = min(40, context.max_length, len(stream))
    lengths = [max(longest // 3, 1), longest, *rng.integers(1, longest + 1, context.options.batch - 2).tolist()]
    rows = [stream[start : start + length] for start, length in _starts(rng, stream, lengths)]
    ids = np.full((len(rows), longest), context.pad, np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    states, embedding, _ = context.run(Batch(ids, mask))
    totals = Totals()
    for row, tokens in enumerate(rows):
        wanted, _ = context.expected(tokens)
        totals.add(states[row, : len(tokens)], wanted, embedding[row], unit_mean(wanted))
    return totals


def _second_segment(context: EncoderContext) -> Totals:
    """The second half of a sequence marked as the second segment."""
    tokens = context.sequences[0]
    segments = (np.arange(len(tokens)) >= len(tokens) // 2).astype(np.int64)
    states, embedding, _ = context.run(Batch(tokens[None, :], np.ones((1, len(tokens)), np.int64), segments[None, :]))
    wanted, _ = context.expected(tokens, segments)
    totals = Totals()
    totals.add(states[0], wanted, embedding[0], unit_mean(wanted))
    return totals


def _starts(rng: np.random.Generator, stream: Ids, lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(int(rng.integers(0, len(stream) - length + 1)), length) for length in lengths]


_CHECKS: tuple[tuple[str, str, Callable[[EncoderContext], Totals], Callable[[EncoderContext], bool]], ...] = (
    ("alone", "Every sequence alone", _alone, lambda _context: True),
    ("padded", "Ragged batch, padded", _padded, lambda _context: True),
    ("second_segment", "Second segment", _second_segment, lambda context: context.segmented),
)


def run_all(context: EncoderContext) -> list[CheckResult]:
    """Every check that applies, in order."""
    wanted = [check for check in _CHECKS if check[3](context)]
    results = []
    with context.progress.task("verifying", len(wanted) + 1) as advance:
        for name, title, run, _ in wanted:
            results.append(_judged(context, name, title, run))
            advance(1)
        results.append(redensified.run(context))
        advance(1)
    return results


def _judged(context: EncoderContext, name: str, title: str, run: Callable[[EncoderContext], Totals]) -> CheckResult:
    began = time.monotonic()
    try:
        totals = run(context)
    except RunFailed as error:
        return CheckResult(name, title, False, str(error))
    gate = context.gate
    reason = ""
    if totals.nonfinite:
        reason = f"{totals.nonfinite} of {totals.tokens} tokens have NaN or Inf states"
    elif not totals.needed <= gate.tolerance:
        reason = f"relative L2 {totals.needed:.1e} exceeds the tolerance {gate.tolerance:.1e}"
    elif totals.cosine < gate.cosine:
        reason = f"cosine of a sentence embedding {totals.cosine:.6f} is below {gate.cosine}"
    first = context.layers.first_beyond(gate.layers) if reason else None
    where = "" if not reason else f"layer.{first}" if first is not None else "embeddings, padding or pooling"
    metrics: dict[str, Metric] = {
        "tokens": totals.tokens,
        "rel_l2": totals.rel_l2,
        "worst_sequence_rel_l2": totals.states,
        "embedding_rel_l2": totals.embedding,
        "embedding_cosine": totals.cosine,
        "nonfinite": totals.nonfinite,
        "needed_tolerance": totals.needed,
        "tolerance": gate.tolerance,
    }
    return CheckResult(name, title, not reason, reason, where, metrics, time.monotonic() - began)
