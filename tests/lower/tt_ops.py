"""The rule that graphs/ops/TTLinear*.onnxtxt follow: the same text for every number of cores.

MIXT_UPDATE_GOLDEN=1 python -m pytest tests/lower/test_tt_ops.py     rewrites the files
"""

from __future__ import annotations

OPS = [(2, bias) for bias in (False, True)]
PLUGIN = ("plugin_namespace", "plugin_version", "aot")


def name(cores: int, bias: bool) -> str:
    return f"TTLinear{cores}{'Bias' if bias else ''}"


def text(cores: int, bias: bool) -> str:
    lines: list[str] = []
    attributes: list[str] = []

    def ints(attribute: str) -> str:
        attributes.append(attribute)
        lines.append(f"[{attribute}] {attribute} = Constant <value_ints: ints = @{attribute}> ()")
        return attribute

    def line(node: str, output: str, op: str, *inputs: str) -> str:
        lines.append(f"[{node}] {output} = {op} ({', '.join(inputs)})")
        return output

    flat = line(f"flat{cores}", f"flat_c{cores}", "Reshape", f"c{cores}", ints(f"matrix{cores}"))
    turned = line(f"turned{cores}", f"turned_c{cores}", "Transpose <perm = [1, 0]>", flat)
    rows = line(f"split{cores}", "rows_x", "Reshape", "x", ints("rows"))
    s = line(f"product{cores}", f"s{cores}", "MatMul", rows, turned)
    for k in range(cores - 1, 0, -1):
        flat = line(f"flat{k}", f"flat_c{k}", "Reshape", f"c{k}", ints(f"matrix{k}"))
        columns = line(f"apart{k}", f"columns_s{k + 1}", "Reshape", s, ints(f"view{k}"))
        s = line(f"product{k}", f"s{k}", "MatMul", flat, columns)
    z = line("joined", "z" if bias else "y", "Reshape", s, ints("join"))
    if bias:
        line("bias", "y", "Add", z, "bias")
    inputs = ["x", *(f"c{k}" for k in range(1, cores + 1)), *(["bias"] if bias else [])]
    header = f"{name(cores, bias)} <{', '.join([*attributes, *PLUGIN])}> ({', '.join(inputs)}) => (y)"
    return (
        f'<domain: "mixt", opset_import: ["" : 20]>\n{header}\n{{\n' + "".join(f"  {line}\n" for line in lines) + "}\n"
    )
