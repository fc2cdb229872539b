"""OUT/device/kernels of a TensorRT folder: the kernels that its graph can use, and an index of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mixt_export.building.kernels.cache import obtain
from mixt_export.building.kernels.compile import Compiled, triton_version
from mixt_export.building.toolkit import toolkit
from mixt_export.progress import SILENT, Progress

_DTYPES = {ir.DataType.FLOAT16: "float16", ir.DataType.FLOAT: "float32"}


@dataclass(frozen=True)
class Carried:
    """What was written: files, operators that have them at every node, number of nodes, and what to tell the user."""

    kernels: tuple[str, ...]
    operators: tuple[str, ...]
    nodes: int
    note: str


def carry_kernels(model: ir.Model, device: Path, progress: Progress = SILENT) -> Carried | None:
    """Compile what the nodes of ``model`` can use into ``device``/kernels; None where no node asks for a kernel.

    Without Triton nothing is written, and the note says so: TensorRT then uses the functions' bodies. Raises MixtError
    when the compiler's process dies.
    """
    nodes = list(_linears(model))
    if not nodes:
        return None
    if triton_version() is None:
        note = (
            "kernels were not compiled, because the Python package 'triton' is not installed (pip install "
            "'mixt-export[kernels]'); TensorRT uses the bodies of the functions instead."
        )
        return Carried((), (), len(nodes), note)
    asked = [(operator, linear.kernel()) for operator, linear in nodes]
    wanted = {kernel.name: kernel for _, kernel in asked if kernel is not None}
    compiled, failed = {}, []
    for result in obtain(list(wanted.values()), progress):
        if isinstance(result, Compiled):
            compiled[result.kernel.name] = result
        else:
            failed.append(f"{result.kernel.name} ({result.reason})")
    bare = {operator for operator, kernel in asked if kernel is None or kernel.name not in compiled}
    operators = tuple(sorted({operator for operator, _ in nodes} - bare))
    _write(device / toolkit("kernel_files").FOLDER, compiled, operators)
    served = sum(operator in operators for operator, _ in nodes)
    many = "1 kernel" if len(compiled) == 1 else f"{len(compiled)} kernels"
    note = (
        f"{many} compiled for {served} of {len(nodes)} linears that can use one; TensorRT 10.9 and later launches "
        "them. They were checked by an assembler; no engine with them was run on a device."
    )
    return Carried(tuple(compiled), operators, len(nodes), f"{note} Not usable: {failed[0]}." if failed else note)


def _linears(model: ir.Model) -> Iterator[tuple[str, Any]]:
    """Operator, and Train or Mixture of tactics, of every node that a plugin may replace."""
    for node in model.graph.all_nodes():
        if node.domain == toolkit("plugins").NAMESPACE and "aot" in node.attributes:
            yield node.op_type, linear_of(node)


def linear_of(node: ir.Node) -> Any:
    """What the plugin of ``node`` will be told by TensorRT, from the shapes and attributes of the graph."""
    plugins = toolkit("plugins")
    bias = node.op_type.endswith("Bias")
    shapes = [_Shape(value) for value in node.inputs]
    given = {name: node.attributes[name].as_ints() for name in ("windows",) if name in node.attributes}
    x = node.inputs[0]
    assert x is not None
    dtype = _DTYPES.get(x.dtype, str(x.dtype)) if x.dtype is not None else "?"
    return plugins.linear_of(node.op_type, shapes, given, dtype, bias)


class _Shape:
    """A tensor as the adapters see it: ``shape``, with -1 for what is open."""

    def __init__(self, value: ir.Value | None) -> None:
        assert value is not None and value.shape is not None
        self.shape = [size if isinstance(size, int) else -1 for size in value.shape]


def _write(folder: Path, compiled: dict[str, Compiled], operators: tuple[str, ...]) -> None:
    files = toolkit("kernel_files")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {}
    for name, kernel in compiled.items():
        (folder / f"{name}.ptx").write_text(kernel.ptx, encoding="ascii")
        facts[name] = {
            "file": f"{name}.ptx", "sha256": kernel.sha256, "entry": kernel.entry, "threads": kernel.threads,
            "shared": kernel.shared,
        }  # fmt: skip
    index = {"schema": files.SCHEMA, "triton": triton_version(), "operators": list(operators), "kernels": facts}
    (folder / files.INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
