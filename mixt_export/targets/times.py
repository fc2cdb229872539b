"""How long a block of a model would take on a device: a model (see plan.gpu), nothing measured.

Every linear three ways: its operators as stored, its operators as planned for the device, and as one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixt_export.errors import UnsupportedError
from mixt_export.families.wiring import Block, Decoder, Linear, MoeMlp
from mixt_export.network import FactorizedLinear
from mixt_export.plan import Form, FormPlan, Gpu, Operation, choose_forms, forms_of
from mixt_export.plan.fusion import fused_seconds
from mixt_export.plan.gpu import CACHE_RATE, REACHED_BANDWIDTH, REACHED_PEAK
from mixt_export.targets.devices import Device

#: Kernels of a block besides linears and attention: two norms, the rotation, the gate's product. Sums are fused.
_GLUE = 4

WAYS = ("dense", "stored", "planned", "fused")
"""The dense model; cores as stored, one kernel an operator; the planned forms likewise; one kernel a linear."""


#: Cached positions of the decoding step and tokens of the prefill that are told, or what the model has room for.
_CACHED, _PROMPT = 512, 512


@dataclass(frozen=True)
class Step:
    """One run of the model: ``tokens`` new ones behind ``past`` cached ones, batch 1."""

    name: str
    tokens: int
    past: int


def usual_steps(decoder: Decoder) -> tuple[Step, Step]:
    """One token behind a cache, and a prompt."""
    room = decoder.max_positions
    return Step("decode", 1, min(_CACHED, room - 1)), Step("prefill", min(_PROMPT, room), 0)


def times_report(
    name: str, decoder: Decoder, factors: Mapping[str, FactorizedLinear], device: Device
) -> dict[str, Any]:
    """Modelled times on ``device`` at float16, as data for JSON: seconds, blocks that are alike together.

    Forms are planned by the objective "balanced". Raises UnsupportedError for a mixture of experts, NetworkError as
    ``network.best_order``.
    """
    if any(isinstance(block.mlp, MoeMlp) for block in decoder.blocks):
        raise UnsupportedError(
            f"{name}: is a mixture of experts; which of them run depends on the token, so their times are not modelled."
        )
    gpu, steps = device.gpu(), usual_steps(decoder)
    known = {linear.name: factors[linear.name] for linear in decoder.linears if linear.name in factors}
    plan = choose_forms(known.values(), device=gpu, itemsize=gpu.item)
    times = block_times(decoder, known, plan, gpu, steps)
    head = head_seconds(decoder, gpu)
    return {
        "kind": "times",
        "name": name,
        "claim": "a model of published figures, not measured",
        "device": {"name": device.name, "title": device.title, "sources": list(device.sources)},
        "model": {**asdict(gpu), "bandwidth": REACHED_BANDWIDTH * gpu.bandwidth, "flops": REACHED_PEAK * gpu.flops,
                  "cache_bandwidth": CACHE_RATE * REACHED_BANDWIDTH * gpu.bandwidth},
        "steps": [asdict(step) for step in steps],
        "groups": _alike(times),
        "head": head,
        "totals": {
            step.name: {way: head + sum(time.whole(way) for time in times if time.step == step) for way in WAYS}
            for step in steps
        },
    }  # fmt: skip


def _alike(times: Sequence[BlockTime]) -> list[dict[str, Any]]:
    """Blocks with the same times in all steps, as one entry a step."""
    of: dict[int, list[BlockTime]] = {}
    for time in times:
        of.setdefault(time.block, []).append(time)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for block, found in of.items():
        key = tuple((time.step, *time.linears.values(), time.attention, time.glue) for time in found)
        groups.setdefault(key, []).append(block)
    return [
        {"blocks": blocks, "step": time.step.name, "linears": dict(time.linears), "attention": time.attention,
         "glue": time.glue, "whole": {way: time.whole(way) for way in WAYS}}
        for blocks in groups.values()
        for time in of[blocks[0]]
    ]  # fmt: skip


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one block in one step: of its linears in each of `WAYS`, of attention with the cache, of the rest."""

    block: int
    step: Step
    linears: Mapping[str, float]
    attention: float
    glue: float

    def whole(self, way: str) -> float:
        """Seconds of the block with its linears executed ``way``."""
        return self.linears[way] + self.attention + self.glue


def block_times(
    decoder: Decoder, factors: Mapping[str, FactorizedLinear], plan: FormPlan, gpu: Gpu, steps: Sequence[Step]
) -> list[BlockTime]:
    """Times of every block in every step. ``factors``: factorised linears by name; ``plan``: their forms on ``gpu``."""
    planned = {name: choice.form for name, choice in plan.choices.items()}
    return [
        BlockTime(
            block.index,
            step,
            {way: sum(_WAYS[way](linear, factors, planned, gpu, step) for linear in block.linears) for way in WAYS},
            attention_seconds(decoder, block, gpu, step),
            _GLUE * gpu.moving(3.0 * gpu.item * step.tokens * decoder.hidden_size),
        )
        for block in decoder.blocks
        for step in steps
    ]


def head_seconds(decoder: Decoder, gpu: Gpu) -> float:
    """Logits of one position with a dense output projection."""
    return _dense(decoder.hidden_size, decoder.vocab_size, gpu, 1)


def attention_seconds(decoder: Decoder, block: Block, gpu: Gpu, step: Step) -> float:
    """Joining the cache (past read, present written, one kernel each for keys and values) and one attention kernel."""
    total = step.past + step.tokens
    row = gpu.item * decoder.kv_heads * decoder.head_dim
    joined = 2 * gpu.moving(row * (step.past + total))
    width = decoder.heads * decoder.head_dim
    macs = 2.0 * width * step.tokens * (step.past + step.tokens / 2)
    return joined + gpu.moving(2 * row * total + 2 * gpu.item * step.tokens * width, macs)


_Factors = Mapping[str, FactorizedLinear]
_Way = Callable[[Linear, _Factors, Mapping[str, Form], Gpu, Step], float]


def _as_dense(linear: Linear, _factors: _Factors, _planned: Mapping[str, Form], gpu: Gpu, step: Step) -> float:
    return _dense(linear.in_features, linear.out_features, gpu, step.tokens)


def _as_stored(linear: Linear, factors: _Factors, planned: Mapping[str, Form], gpu: Gpu, step: Step) -> float:
    known = factors.get(linear.name)
    if known is None:
        return _as_dense(linear, factors, planned, gpu, step)
    return gpu.seconds(forms_of(known)[0].operations, step.tokens)


def _as_planned(linear: Linear, factors: _Factors, planned: Mapping[str, Form], gpu: Gpu, step: Step) -> float:
    form = planned.get(linear.name)
    if form is None:
        return _as_stored(linear, factors, planned, gpu, step)
    return gpu.seconds(form.operations, step.tokens)


def _as_fused(linear: Linear, factors: _Factors, planned: Mapping[str, Form], gpu: Gpu, step: Step) -> float:
    known = factors.get(linear.name)
    if known is None:
        return _as_dense(linear, factors, planned, gpu, step)
    return fused_seconds(known, forms_of(known)[0], step.tokens, gpu)


_WAYS: dict[str, _Way] = dict(zip(WAYS, (_as_dense, _as_stored, _as_planned, _as_fused), strict=True))


def _dense(inner: int, columns: int, gpu: Gpu, tokens: int) -> float:
    return gpu.seconds([Operation("right", 1, 1, inner, columns, inner * columns)], tokens)
