"""Lower a two-factor linear as pivot rows: two products and a Gather, made of the factors while they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.errors import UnsupportedError
from mixt_export.network import FactorizedLinear
from mixt_export.plan.pivot import PivotForm, Pivots, factors, pivots

if TYPE_CHECKING:
    from mixt_export.lower.linear import LinearContext  # which calls the module that calls this one

Array = np.ndarray[Any, Any]
Load = Callable[[str], Array]


@dataclass
class Pivoting:
    """W_p, C and the order of the rows of ``linear``, all of one computation, forgotten when each was taken once.

    ``dtype``: what W_p and C are stored in. What is taken again is computed again.
    """

    linear: FactorizedLinear
    dtype: str
    _found: Pivots | None = None
    _taken: set[str] = field(default_factory=set)

    def take(self, what: str, load: Load) -> Array:
        """``rows`` (in, r), ``rest`` (r, out - r) or ``order`` (out,), see `plan.pivot.Pivots`.

        Raises UnsupportedError where the rewritten matrix is not accurate enough.
        """
        if self._found is None:
            down, up = factors(self.linear, load)
            unit = float(ml_dtypes.finfo(numpy_dtype(self.dtype)).eps) / 2
            self._found = pivots(down, up, unit)
        if self._found.refusal:
            raise UnsupportedError(
                f"{self.linear.name}: the form pivot does not stand for its matrix in {self.dtype}: "
                f"{self._found.refusal}; leave this linear out of --form REGEX=pivot."
            )
        value: Array = getattr(self._found, what)
        self._taken.add(what)
        if len(self._taken) == 3:
            self._found, self._taken = None, set()
        return value


def pivot_weights(context: LinearContext, form: PivotForm, factors: FactorizedLinear) -> list[ir.Value]:
    """The initializers W_p (in, r), C (r, out - r) and order (out,) int32 of `mixt::PivotLinear`."""
    weights, name = context.weights, factors.name
    sources = [tensor.name for tensor in factors.core_tensors()]
    pivoting = Pivoting(factors, weights.dtype)
    load = partial(weights.checkpoint.store.read, dtype="float32")
    shapes = {"rows": (form.in_features, form.rank), "rest": (form.rank, form.out_features - form.rank)}
    made = [
        weights.derived(f"{name}.pivot.{what}", shape, sources, partial(pivoting.take, what))
        for what, shape in shapes.items()
    ]
    order = weights.packed(f"{name}.pivot.order", (form.out_features,), "int32", lambda: pivoting.take("order", load))
    return [context.builder.initializer(tensor) for tensor in (*made, order)]
