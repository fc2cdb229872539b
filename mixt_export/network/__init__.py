"""The intermediate representation of factorised linears. Needs numpy and opt_einsum, nothing else."""

from mixt_export.network import build
from mixt_export.network.contraction import apply, densify, einsum
from mixt_export.network.description import from_json, to_json
from mixt_export.network.ir import Branch, Core, FactorizedLinear, Mode, SparseResidual, TensorRef
from mixt_export.network.order import Order, best_order, best_orders, macs

__all__ = [
    "Branch",
    "Core",
    "FactorizedLinear",
    "Mode",
    "Order",
    "SparseResidual",
    "TensorRef",
    "apply",
    "best_order",
    "best_orders",
    "build",
    "densify",
    "einsum",
    "from_json",
    "macs",
    "to_json",
]
