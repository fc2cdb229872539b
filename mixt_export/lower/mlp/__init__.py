"""MLPs: how each kind a block may have is lowered. A new kind = a dataclass, a file here, a line in MLPS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from mixt_export.families.wiring import GatedMlp, Mlp, MoeMlp, PackedGatedMlp, PlainMlp
from mixt_export.lower.context import Context
from mixt_export.lower.mlp.experts import lower_moe
from mixt_export.lower.mlp.gated import lower_gated, lower_packed
from mixt_export.lower.mlp.plain import lower_plain

__all__ = ["MLPS", "lower_mlp"]

#: Kind -> (context, the mlp, x (batch, seq, hidden), node) -> y (batch, seq, hidden), in the graph's dtype or float32.
MLPS: dict[type, Callable[[Context, Any, ir.Value, str], ir.Value]] = {
    GatedMlp: lower_gated,
    MoeMlp: lower_moe,
    PackedGatedMlp: lower_packed,
    PlainMlp: lower_plain,
}


def lower_mlp(context: Context, mlp: Mlp, x: ir.Value, node: str) -> ir.Value:
    """mlp(x); nodes are called ``node``/…, e.g. ``/model/layers.0/mlp``."""
    return MLPS[type(mlp)](context, mlp, x, node)
