"""The forms in which a replaced linear can be executed, and counts that the literature quotes instead of one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mixt_export.accounting.support import cropped_macs, nonzeros
from mixt_export.network import FactorizedLinear, best_orders, macs
from mixt_export.network.order import steps
from mixt_export.plan import MixtForm, Mixture, Window, mixt_forms


@dataclass(frozen=True)
class Cost:
    """One linear in one form.

    ``macs``: multiply-adds per token. ``weights``: numbers held to execute it. ``workspace``: numbers per token that it
    holds beside its input and its output. ``runs``: it can be executed; False for counts of what cannot.
    """

    macs: int
    weights: int
    workspace: int = 0
    runs: bool = True


def forms_of(linear: FactorizedLinear) -> dict[str, Cost]:
    """Form or count -> cost of ``linear``; its form as stored is ``branches``, its matrix ``dense``."""
    mixture = Mixture.of(linear)
    if mixture is not None:
        return _of_mixture(linear, mixture)
    stored = sum(core.size for core in linear.core_tensors())
    return {
        "branches": Cost(macs(linear), stored, _contraction_workspace(linear)),
        "dense": dense_cost(linear.in_features, linear.out_features),
    }


def dense_cost(in_features: int, out_features: int) -> Cost:
    """One product with the (out, in) matrix."""
    return Cost(in_features * out_features, in_features * out_features)


def _of_mixture(linear: FactorizedLinear, mixture: Mixture) -> dict[str, Cost]:
    """Forms with groups of equal size, and of what cannot be executed as such: padding, cropping, zeros, Eq. 2."""
    stored = mixture.stored_elements
    counts = {
        "merged, no zeros": Cost(nonzeros(mixture), nonzeros(mixture), runs=False),
        "parameters (Eq. 2)": Cost(stored, stored, runs=False),
    }
    if any(branch.padded for branch in linear.branches):
        padded = next(form for form in mixt_forms(linear, crop=False) if form.name == "branches")
        counts["branches, all padding"] = Cost(padded.macs, stored, runs=False)
        counts["branches, no padding"] = Cost(cropped_macs(mixture), stored, runs=False)
    forms = [form for form in mixt_forms(linear) if form.layout == "right" and _equal(form.partition)]
    return {form.name: Cost(form.macs, form.elements, _workspace(form)) for form in forms} | counts


def _equal(partition: tuple[int, ...]) -> bool:
    """Whether all groups are as large as the first; the last may be smaller."""
    return all(count == partition[0] for count in partition[:-1]) and partition[-1] <= partition[0]


def _workspace(form: MixtForm) -> int:
    """Numbers per token of the buffers between input and output; the sum of the windows so far is the output's own."""
    if form.dense:
        return 0
    peaks = [
        _chain_peak(_buffers(form, window)) + (form.out_features if number else 0)
        for number, window in enumerate(form.windows)
    ]
    return max(peaks) - form.out_features


def _buffers(form: MixtForm, window: Window) -> list[int]:
    """Sizes of what one window makes after another: fitted input, moved input, product, moved product, fitted."""
    moved = window.right > 1
    buffers = [window.in_size] * (window.in_size != form.in_features)
    buffers += [window.in_size] * moved + [window.out_size] * (1 + moved)
    return buffers + [form.out_features] * (window.out_size != form.out_features)


def _chain_peak(buffers: list[int]) -> int:
    """Most that two neighbours of a chain hold: each is made from the one before and then replaces it."""
    return max((a + b for a, b in pairwise(buffers)), default=buffers[0])


def _contraction_workspace(linear: FactorizedLinear) -> int:
    """The same for any network contracted activation first, as network.macs counts it: the largest intermediates."""
    peak = 0
    for number, (branch, order) in enumerate(zip(linear.branches, best_orders(linear), strict=True)):
        sizes = branch.sizes()
        states = []
        for _, labels in steps(branch, order):
            size = 1
            for label in labels:
                size *= sizes[label]
            states.append(size)
        peak = max(peak, _chain_peak(states) + (linear.out_features if number else 0))
    return max(peak - linear.out_features, 0)
