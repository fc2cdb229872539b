"""How an export's factorised linears are to be executed: options, and the plan they lead to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixt_export.errors import UsageError
from mixt_export.lower import LoweredModel
from mixt_export.lower.weights import itemsize
from mixt_export.network import FactorizedLinear
from mixt_export.plan import CPU, Budget, Device, FormPlan, Gpu, choose_forms
from mixt_export.plan.variants import with_variants
from mixt_export.targets.files import initializer_bytes
from mixt_export.targets.guard import guard_weights

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_LARGEST = 1 << 63


@dataclass(frozen=True)
class FormOptions:
    """``optimize_for``: a key of plan.OBJECTIVES; ``overrides``: (regular expression, form) for the linears it matches.

    ``memory_budget``: bytes that all weights of the graph may take, None for the objective's own limit. ``einsum``:
    networks written as Einsum nodes, to be read. ``device``: for whose costs the forms are chosen. ``variants``: "one"
    graph with two forms of a linear where that is predicted to pay, or "none", see plan.variants.
    """

    optimize_for: str = "balanced"
    overrides: Sequence[tuple[str, str]] = ()
    memory_budget: int | None = None
    einsum: bool = False
    device: Device | Gpu = CPU
    variants: str = "none"


def lower_planned(
    linears: Sequence[FactorizedLinear], options: FormOptions, dtype: str, lower: Callable[[FormPlan], LoweredModel]
) -> tuple[FormPlan, LoweredModel, int]:
    """The plan for ``linears``, the graph that ``lower`` makes of it, and the bytes of its weights, guarded.

    With a budget the graph is lowered twice: what is not factorised takes the same in every plan, and is seen there.
    Raises as `plan.choose_forms`, ``lower`` and `guard.guard_weights`.
    """
    item = itemsize(dtype)

    def planned(budget: Budget | None) -> tuple[FormPlan, LoweredModel, int]:
        plan = choose_forms(
            linears,
            options.optimize_for,
            options.overrides,
            options.device,
            budget=budget,
            itemsize=item,
            einsum=options.einsum,
        )
        if options.variants == "one":
            fixed = [name for name in plan.choices if any(re.search(regex, name) for regex, _ in options.overrides)]
            plan = with_variants(plan, fixed=fixed, budget=budget)
        lowered = lower(plan)
        nbytes = initializer_bytes(lowered.model)
        guard_weights(lowered, plan, nbytes)
        return plan, lowered, nbytes

    found = planned(None)
    if options.memory_budget is None:
        return found
    plan, _, nbytes = found
    return planned(Budget(options.memory_budget, nbytes - plan.planned_elements * item, item))


def parse_bytes(text: str, option: str) -> int:
    """Bytes of ``text``: a number and B, KB, MB, GB (powers of 1000), KiB, MiB or GiB. Raises UsageError otherwise."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(match[2].upper()) if match else None
    size = float(match[1]) * factor if match and factor else 0.0
    if not 1 <= size < _LARGEST:
        raise UsageError(f"{option} {text}: is no size; write a number with a unit, such as 400MB or 1.5GiB.")
    return int(size)
