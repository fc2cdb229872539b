"""A graph as text, for review: a line per weight and node. MIXT_UPDATE_GOLDEN=1 rewrites the files."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx.printer
import onnx_ir as ir

FOLDER = Path(__file__).parent.parent / "graphs" / "golden"


def as_text(model: ir.Model) -> str:
    graph = model.graph
    lines = [f"opsets {dict(sorted(graph.opset_imports.items()))}", "", "inputs"]
    lines += [f"  {typed(value)}" for value in graph.inputs]
    lines += ["", "weights"]
    for value in graph.initializers.values():
        tensor = value.const_value
        where = (
            f"{tensor.location}+{tensor.offset}"
            if isinstance(tensor, ir.ExternalTensor)
            else str(tensor.numpy().tolist())
        )
        lines.append(f"  {typed(value)} = {where}")
    lines += ["", "nodes"]
    for node in graph:
        attributes = ", ".join(f"{a.name}={a.value}" for a in sorted(node.attributes.values(), key=lambda a: a.name))
        inputs = ", ".join(value.name if value is not None else "-" for value in node.inputs)
        outputs = ", ".join(typed(value) for value in node.outputs)
        domain = f"{node.domain}::" if node.domain else ""
        lines.append(f"  [{node.name}] {outputs} = {domain}{node.op_type}<{attributes}>({inputs})")
    lines += ["", "outputs"]
    lines += [f"  {typed(value)}" for value in graph.outputs]
    for function in model.functions.values():
        lines += ["", onnx.printer.to_text(ir.serde.serialize_function(function)).strip()]
    return "\n".join(lines) + "\n"


def typed(value: ir.Value) -> str:
    return f"{value.name}: {value.dtype.short_name()}[{', '.join(str(dim) for dim in value.shape)}]"


def check(name: str, text: str) -> None:
    path = FOLDER / f"{name}.txt"
    if os.environ.get("MIXT_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; make it with MIXT_UPDATE_GOLDEN=1"
    assert text == path.read_text(encoding="utf-8"), (
        f"{path.name} differs; if intended, MIXT_UPDATE_GOLDEN=1 rewrites it"
    )
