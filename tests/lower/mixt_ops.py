"""The rule that graphs/ops/MixTLinear*.onnxtxt follow: the same text for every number of windows.

MIXT_UPDATE_GOLDEN=1 python -m pytest tests/lower/test_mixt_ops.py     rewrites the files
"""

from __future__ import annotations

from dataclasses import dataclass

from mixt_export.plan.windows import MAX_WINDOWS


@dataclass(frozen=True)
class Op:
    windows: int
    left: bool = False
    padded: bool = False
    bias: bool = False

    @property
    def name(self) -> str:
        kind = "Left" if self.left else "Padded" if self.padded else ""
        return f"MixTLinear{self.windows}{kind}{'Bias' if self.bias else ''}"


OPS = [
    Op(windows, left, padded, bias)
    for windows in range(2, MAX_WINDOWS + 1)
    for left, padded in ((False, False), (True, False), (False, True))
    for bias in (False, True)
]


def text(op: Op) -> str:
    body = _Text()
    weights = [f"w{k}" for k in range(1, op.windows + 1)]
    addends = (_left if op.left else _right)(body, op)
    total = addends[0]
    for k, addend in enumerate(addends[1:], 2):
        last = k == op.windows and not op.left and not op.bias
        total = body.line(f"sum{k}", "y" if last else f"sum{k}", "Add", total, addend)
    if op.left:
        body.line("back", "flat_y", "Transpose <perm = [1, 0]>", total)
        body.line("sizes", "sizes", "Shape", "x")
        body.line("first_two", "first_two", "Constant <value_ints = [0, 1]>")
        body.line("leading", "leading", "Gather", "sizes", "first_two")
        body.ints("out_features")
        body.line("shape", "shape", "Concat <axis = 0>", "leading", "out_features")
        total = body.line("whole", "z" if op.bias else "y", "Reshape", "flat_y", "shape")
    if op.bias:
        body.line("bias", "y", "Add", total, "bias")
    inputs = ", ".join(["x", *weights, *(["bias"] if op.bias else [])])
    return (
        f'<domain: "mixt", opset_import: ["" : 20]>\n{op.name} <{", ".join(body.attributes)}> ({inputs}) => (y)\n'
        "{\n" + "".join(f"  {line}\n" for line in body.lines) + "}\n"
    )


class _Text:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.attributes: list[str] = []

    def line(self, node: str, output: str, op: str, *inputs: str) -> str:
        self.lines.append(f"[{node}] {output} = {op} ({', '.join(inputs)})")
        return output

    def ints(self, name: str) -> str:
        if name not in self.attributes:
            self.attributes.append(name)
            self.line(name, name, f"Constant <value_ints: ints = @{name}>")
        return name


def _right(body: _Text, op: Op) -> list[str]:
    addends = []
    for k in range(1, op.windows + 1):
        x, join = "x", "join"
        if op.padded:
            x, join = body.line(f"fit_in{k}", f"x{k}", "Pad", "x", body.ints(f"pads_in{k}")), f"join{k}"
        if k < op.windows:
            x = body.line(f"split{k}", f"split_x{k}", "Reshape", x, body.ints(f"apart_in{k}"))
            x = body.line(f"inwards{k}", f"moved_x{k}", "Transpose <perm = [0, 1, 3, 2]>", x)
        x = body.line(f"rows{k}", f"rows_x{k}", "Reshape", x, body.ints(f"columns{k}"))
        z = body.line(f"product{k}", f"rows_z{k}", "MatMul", x, f"w{k}")
        if k < op.windows:
            z = body.line(f"apart{k}", f"moved_z{k}", "Reshape", z, body.ints(f"apart_out{k}"))
            z = body.line(f"outwards{k}", f"split_z{k}", "Transpose <perm = [0, 1, 3, 2]>", z)
        z = body.line(f"joined{k}", f"z{k}", "Reshape", z, body.ints(join))
        if op.padded:
            z = body.line(f"fit_out{k}", f"y{k}", "Pad", z, body.ints(f"pads_out{k}"))
        addends.append(z)
    return addends


def _left(body: _Text, op: Op) -> list[str]:
    flat = body.line("flat", "flat_x", "Reshape", "x", body.ints("in_features"))
    columns = body.line("forth", "columns_x", "Transpose <perm = [1, 0]>", flat)
    addends = []
    for k in range(1, op.windows + 1):
        x = body.line(f"split{k}", f"split_x{k}", "Reshape", columns, body.ints(f"apart_in{k}"))
        z = body.line(f"product{k}", f"split_z{k}", "MatMul", f"w{k}", x)
        addends.append(body.line(f"joined{k}", f"columns_z{k}", "Reshape", z, body.ints("join")))
    return addends
