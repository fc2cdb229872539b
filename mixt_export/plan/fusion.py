"""What one kernel for a whole linear would take on a GPU: a model, see `gpu`; none was timed on a board.

The cores are read from memory once, the input read, the output written, nothing in between leaves the chip. The price:
programs take some tokens each and read the cores again from the second-level cache; where there are fewer blocks of
tokens than processors, C programs split the outputs of a block evenly over its modes, and C^(1 - p) of them repeat a
product after which the share p of the output's modes (by logarithm of size) is there. Low rank repeats its first
product C times (p = 0), a tensor train of two square cores C^(1/2) times. The block of tokens is the best one; whether
its intermediate results fit a processor's shared memory is not asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pow

from mixt_export.network import Branch, FactorizedLinear
from mixt_export.network.order import steps
from mixt_export.plan.forms import Form
from mixt_export.plan.gpu import REACHED_BANDWIDTH, REACHED_PEAK, Gpu
from mixt_export.plan.merged import merge
from mixt_export.plan.windows import MixtForm

#: Tokens that a program takes together.
_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Part:
    """One product inside a fused kernel. ``macs`` per token; ``done``: share of the output's modes it leaves behind."""

    macs: int
    weights: int
    done: float


def fused_seconds(linear: FactorizedLinear, form: Form, tokens: int, gpu: Gpu) -> float:
    """Predicted time of ``form`` of ``linear`` as one kernel for ``tokens`` tokens in one run."""
    if form.dense:
        return gpu.seconds(form.operations, tokens)
    found = parts(linear, form)
    memory = gpu.item * (form.elements + tokens * (form.in_features + form.out_features))
    return min(_blocked(found, memory, tokens, block, gpu) for block in _BLOCKS) + gpu.launch


def _blocked(found: list[Part], memory: int, tokens: int, block: int, gpu: Gpu) -> float:
    blocks = -(-tokens // block)
    programs = max(1, gpu.processors // blocks)
    repeated = [pow(programs, 1.0 - part.done) for part in found]
    again = gpu.item * sum((blocks * times - 1) * part.weights for times, part in zip(repeated, found, strict=True))
    macs = tokens * sum(times * part.macs for times, part in zip(repeated, found, strict=True))
    reading = memory / (REACHED_BANDWIDTH * gpu.bandwidth) + gpu.near(again)
    return max(reading, 2 * macs / (REACHED_PEAK * gpu.flops))


def parts(linear: FactorizedLinear, form: Form) -> list[Part]:
    """The products of ``form``, in order; those of a MixT's windows each make the whole output."""
    if isinstance(form, MixtForm):
        return [Part(window.macs, window.elements, 1.0) for window in form.windows]
    network = merge(linear, form.groups).network
    return [part for branch in network.branches for part in _of_branch(branch)]


def _of_branch(branch: Branch) -> list[Part]:
    sizes = branch.sizes()
    outputs = {label: log(size) for label, size in branch.out_modes if size > 1}
    whole = sum(outputs.values())
    found = []
    for core, (macs, after) in zip(branch.cores, steps(branch, tuple(range(len(branch.cores)))), strict=True):
        done = sum(outputs.get(label, 0.0) for label in after) / whole if whole else 1.0
        weights = 1
        for label in core.labels:
            weights *= sizes[label]
        found.append(Part(macs, weights, min(done, 1.0)))
    return found
