"""Peak memory of inference at one shape, by liveness over a decoder block, without a graph and without weights.

Counted: weights, keys and values of all positions, the live activations of the block where they are most (or the last
position's logits), workspaces of factorised linears, and the attention scores (batch, heads, seq, positions) in float32
that an unfused attention holds. Not counted: the runtime itself, its allocator's rounding, a second copy of weights
(prepacking, widening), rotary tables, logits of other positions than the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mixt_export.accounting.compute import FormCosts
from mixt_export.accounting.parameters import Parameters
from mixt_export.families.wiring import Block, Decoder, Linear, MoeMlp

#: Format of weights, activations and cache -> bytes of an element.
ITEM_BYTES = {"float32": 4, "float16": 2}

_SCORE_BYTES = 4
_LOGIT_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes. ``activations``: most live at once, ``where`` in a block; ``scores``: of one attention, unfused."""

    weights: int
    kv_cache: int
    activations: int
    scores: int
    where: str

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.kv_cache + self.activations + self.scores


def peak_memory(
    decoder: Decoder, parameters: Parameters, costs: FormCosts, *, dtype: str, batch: int, new: int, positions: int
) -> Memory:
    """Memory of one run of ``new`` tokens per sequence, ``positions`` in the cache afterwards, linears in one form.

    ``parameters`` of the model, whose linears hold what ``costs`` says. ``dtype``: float32 or float16, of weights,
    activations and cache. Prefill is new = positions, a decoding step new = 1.
    """
    item, tokens = ITEM_BYTES[dtype], batch * new
    elements, where = max((_peak(_block_steps(decoder, block, costs)) for block in decoder.blocks), key=lambda p: p[0])
    activations = elements * tokens * item
    head = (decoder.hidden_size + decoder.vocab_size) * item
    widened = decoder.vocab_size * (item + _LOGIT_BYTES) if item != _LOGIT_BYTES else 0
    logits = batch * max(head, widened)
    return Memory(
        weights=(parameters.total - parameters.linears + costs.weights) * item,
        kv_cache=batch * positions * decoder.kv_bytes_per_token(item),
        activations=max(activations, logits),
        scores=batch * decoder.heads * new * positions * _SCORE_BYTES,
        where=where if activations >= logits else "lm_head",
    )


@dataclass(frozen=True)
class _Step:
    """One operation of a block: elements per token that it makes under a name, names that die after it."""

    name: str
    makes: int
    ends: Sequence[str] = ()
    workspace: int = 0


def _peak(block: Iterable[_Step]) -> tuple[int, str]:
    """Most elements per token alive at once, and the operation at which they are."""
    live: dict[str, int] = {}
    peak, where = 0, ""
    for step in block:
        live[step.name] = step.makes
        now = sum(live.values()) + step.workspace
        if now > peak:
            peak, where = now, step.name
        for name in step.ends:
            del live[name]
    return peak, where


def _block_steps(decoder: Decoder, block: Block, costs: FormCosts) -> list[_Step]:
    """Operations in the order they run; additions to the residual and products are written over an input."""
    hidden, attention = decoder.hidden_size, block.attention
    # A mixture of experts has a row for every expert that a token chooses, all experts' rows together.
    mlp, rows = (block.mlp.experts[0], block.mlp.top_k) if isinstance(block.mlp, MoeMlp) else (block.mlp, 1)
    shared = block.parallel and block.mlp_norm is None
    read_first = ["input_norm"] if block.attention_norm is not None else []
    read_then = ["post_attention_norm"] if block.mlp_norm is not None else read_first if shared else []

    def linears(layers: Sequence[Linear], read: Sequence[str], rows: int = 1) -> tuple[list[_Step], list[str]]:
        """Linears of one input, which dies after the last; their names."""
        names = [layer.name.rsplit(".", 1)[-1] for layer in layers]
        ends = [*([()] * (len(layers) - 1)), tuple(read)]
        made = zip(names, layers, ends, strict=True)
        return [
            _Step(name, rows * layer.out_features, end, rows * costs.linears[layer.name].workspace)
            for name, layer, end in made
        ], names

    projections, heads = linears(attention.qkv, () if shared else read_first)
    inner = [layer for layer in mlp.linears if layer not in mlp.writers]
    widening, gates = linears(inner, read_then, rows)
    output, out = linears([attention.o], ())
    narrowing, down = linears(mlp.writers, (), rows)
    return [
        _Step("residual", hidden),
        *(_Step(name, hidden) for name in read_first),
        *projections,
        _Step("attention", attention.o.in_features, heads),
        replace(output[0], ends=("attention", *out)),
        *(_Step(name, hidden) for name in read_then if not shared),
        *widening,
        _Step("activation", rows * mlp.writers[0].in_features, gates),
        replace(narrowing[0], ends=("activation", *down)),
    ]
