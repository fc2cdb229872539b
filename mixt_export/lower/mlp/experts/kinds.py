"""The gates, the ups or the downs of all experts of a layer: what they share is applied outside of the experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.wiring import Linear, MoeMlp
from mixt_export.lower.builder import Dim
from mixt_export.lower.context import Context
from mixt_export.lower.dialects import Dialect
from mixt_export.lower.mlp.activations import ACTIVATIONS
from mixt_export.lower.mlp.experts.shared import Chain, SharedFactors, chain_of, chain_or_none, shared_factors
from mixt_export.lower.precision import dims
from mixt_export.network import FactorizedLinear, TensorRef

#: What the report calls the form of a linear that shares factors with those of the other experts.
SHARED_FORM = "SharedFactors"

#: The same of an expert's linear that is a product of matrices of its own.
PRODUCT_FORM = "MatrixProduct"


@dataclass(frozen=True)
class Kind:
    """``linears`` of all experts in order; ``shared``: factors applied outside of them, or None.

    ``shift``: float16 islands: inputs are multiplied by 2^-shift and outputs, in float32, by 2^shift.
    """

    context: Context
    linears: tuple[Linear, ...]
    shared: SharedFactors | None
    shift: int
    node: str

    def own(self, expert: int) -> Chain | None:
        """The matrices of an expert's own part where it is multiplied matrix by matrix, else None."""
        if self.shared is not None:
            return self.shared.middles[expert]
        chain = chain_or_none(self.context.weights.checkpoint.factors.get(self.linears[expert].name))
        return chain if chain is not None and len(chain) > 2 else None

    @property
    def inside(self) -> tuple[int, int]:
        """Features that the experts' own part reads and writes."""
        first = self.linears[0]
        if self.shared is None:
            return first.in_features, first.out_features
        middle = self.shared.middles[0]
        return middle[0].shape[0], middle[-1].shape[1]

    def reads_like(self, other: Kind) -> bool:
        """Whether the experts' own part reads the very same values."""
        heads = [None if kind.shared is None else kind.shared.head for kind in (self, other)]
        return heads[0] == heads[1] and self.shift == other.shift

    def begin(self, x: ir.Value, rows: Dim) -> ir.Value:
        """What the experts' own part reads: x (1, rows, in) in the graph's dtype, scaled, times the shared head."""
        x = self.context.precision.narrow(x, self.shift)
        return self._product(x, None if self.shared is None else self.shared.head, rows, "shared_in")

    def finish(self, x: ir.Value) -> ir.Value:
        """The linears' outputs from those of the experts' own part: the shared tail, the scale undone in float32."""
        y = self._product(x, None if self.shared is None else self.shared.tail, dims(x)[1], "shared_out")
        if not self.shift:
            return y
        return self.context.precision.scaled(self.context.precision.wide(y), self.shift)

    def _product(self, x: ir.Value, matrix: TensorRef | None, rows: Dim, name: str) -> ir.Value:
        if matrix is None:
            return x
        value = self.context.builder.initializer(self.context.weights.tensor(matrix.name))
        return self.context.builder.op(
            "MatMul", [x, value], name=f"{self.node}/{name}/MatMul", dtype=self.context.dtype,
            shape=[1, rows, matrix.shape[1]],
        )  # fmt: skip


def kinds_of(context: Context, moe: MoeMlp, node: str) -> tuple[Kind, Kind, Kind]:
    """Gate, up and down of ``moe``. Raises CheckpointError where factors have other features than config.json says."""
    gate, up, down = (_kind(context, linears, node) for linears in moe.kinds)
    return gate, up, down


def gated(
    context: Context, kinds: Iterable[Kind], activation: str, halves: tuple[ir.Value, ir.Value], node: str
) -> ir.Value:
    """activation(gate) · up of the rows of one or all experts, in float32 where one of ``kinds`` is an island."""
    gate, up = halves
    if any(kind.shift for kind in kinds):
        gate, up = context.precision.wide(gate), context.precision.wide(up)
    return context.binary("Mul", ACTIVATIONS[activation](context, gate, node), up, f"{node}/Mul")


def run_as_stored(moe: MoeMlp, factors: Mapping[str, FactorizedLinear], dialect: Dialect | None) -> frozenset[str]:
    """Linears of ``moe`` that are multiplied matrix by matrix whatever a plan says.

    Those that share factors, all in a loop, and products of three matrices and more: of what else a plan may choose for
    them not every operator of ONNX Runtime takes zero rows.
    """
    found: set[str] = set()
    for kind in moe.kinds:
        own = {linear.name: factors.get(linear.name) for linear in kind}
        every = (dialect is not None and dialect.typed) or shared_factors(list(own.values())) is not None
        found |= {name for name, linear in own.items() if every or len(chain_or_none(linear) or ()) > 2}
    return frozenset(found)


def _kind(context: Context, linears: tuple[Linear, ...], node: str) -> Kind:
    factors = [context.weights.checkpoint.factors.get(linear.name) for linear in linears]
    for linear, found in zip(linears, factors, strict=True):
        if found is not None and (found.in_features, found.out_features) != (linear.in_features, linear.out_features):
            raise CheckpointError(
                f"{linear.name}: config.json wants {linear.in_features} to {linear.out_features} features, the factors "
                f"map {found.in_features} to {found.out_features}; all experts of a layer must be of one size."
            )
        if found is not None and chain_of(found) is None:
            raise UnsupportedError(
                f"{linear.name}: an expert may be dense or a product of matrices (low rank, td-moe), which takes zero "
                f"rows when no token chooses it; {found.method or 'its'} factors are no such product: leave experts "
                "out with --exclude experts."
            )
    shared = shared_factors(factors)
    form = PRODUCT_FORM if shared is None else SHARED_FORM
    as_stored = (linear.name for linear, own in zip(linears, factors, strict=True) if len(chain_or_none(own) or ()) > 1)
    context.linears.forms.update(dict.fromkeys(as_stored, form))
    shift = max(context.islands.shifts.get(linear.name, 0) for linear in linears)
    return Kind(context, linears, shared, shift, f"{node}/experts.{linears[0].name.rsplit('.', 1)[-1]}")
