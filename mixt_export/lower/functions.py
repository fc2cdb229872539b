"""Load model-local functions of the `mixt` domain from their normative text, graphs/ops/*.onnxtxt."""

from __future__ import annotations

from functools import cache

import onnx
import onnx.parser
import onnx_ir as ir

from mixt_export.resources import resource


@cache
def function_text(op_type: str) -> str:
    """Normative text of ``op_type``."""
    return (resource("graphs") / "ops" / f"{op_type}.onnxtxt").read_text(encoding="utf-8")


def load_function(op_type: str) -> ir.Function:
    """A fresh copy of the function ``op_type``, every node of its body named."""
    return ir.serde.deserialize_function(onnx.parser.parse_function(function_text(op_type)))
