"""Tables of `mixt inspect --as`: the report of mixt_export.accounting for people."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SHOWN_FORMS = ("branches", "pairs", "dense")


def show(console: Console, report: dict[str, Any]) -> None:
    """Print ``report``, whose ``kind`` is ``accounting``."""
    model, request = report["model"], report["request"]
    console.print(f"{model['name']} ({model['model_type']}, {model['blocks']} blocks), counted without weights")
    if request["method"] is not None:
        count = len(request["blocks"])
        console.print(f"{request['method']} in {count} block{'s' * (count > 1)}: {_ranges(request['blocks'])}")
    seq, batch, attention = request["seq"], request["batch"], report["attention_macs_per_token"] / 1e9
    notes = {
        _parameters: "GB are 10^9 bytes. int8 and int4: one float16 scale for 128 values of a row.",
        _types: "",
        _compute: f"Attention over {seq:,} positions adds {attention:.4f} G to each. Training (forward and backward) "
        "takes three times as many.",
        _memory: f"Batch {batch}: a prefill of {seq:,} tokens, then a step at {seq:,} positions. Scores: of one "
        "unfused attention. Not counted: the runtime and its own copies of weights.",
    }
    for table, note in notes.items():
        console.print()
        console.print(table(report))
        if note:
            console.print(note)
    if "paper" in report:
        console.print()
        console.print(_paper(report["paper"]))
        for row in report["paper"]:
            console.print(f"- {row['quantity']}: {row['why']}")


def _parameters(report: dict[str, Any]) -> Table:
    variants = report["variants"]
    dense = variants[0]
    table = _table("Parameters and storage", "", *(variant["name"] for variant in variants))
    for key in ("linears", "embedding", "head", "vectors", "total"):
        table.add_row(key, *(f"{variant['parameters'][key]:,}" for variant in variants))
    before = dense["parameters"]["total"]
    table.add_row("change", "", *(_change(before, variant["parameters"]["total"]) for variant in variants[1:]))
    for name in dense["storage_bytes"]:
        table.add_row(name, *(f"{variant['storage_bytes'][name] / 1e9:.3f} GB" for variant in variants))
    return table


def _types(report: dict[str, Any]) -> Table:
    """One row per group of types that are alike: parameters of one linear and the shapes of its tensors."""
    variants = report["variants"]
    names = [variant["name"] for variant in variants[1:]]
    table = _table("One linear of each type: parameters, tensors", "type", "out × in", "replaced", "dense", *names)
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, kind in variants[0]["types"].items():
        out_features, in_features = kind["shape"]
        replaced = max((variant["types"][name]["replaced"] for variant in variants[1:]), default=0)
        cells = [f"{out_features} × {in_features}", f"{replaced} of {kind['count']}", f"{out_features * in_features:,}"]
        cells += [_tensors(variant["types"][name]["tensors"]) for variant in variants[1:]]
        rows.setdefault(tuple(cells), []).append(name)
    for row, alike in rows.items():
        table.add_row("\n".join(alike), *row)
    return table


def _tensors(shapes: list[list[int]]) -> str:
    """Parameters and shapes of the tensors of one linear, for example 1,048,576 and 4 of 512 × 512."""
    if not shapes:
        return "as dense"
    total = sum(shape[0] * shape[1] for shape in shapes)
    runs = [(shape, len(list(run))) for shape, run in groupby(shapes)]
    return "\n".join([f"{total:,}", *(f"{count} of " * (count > 1) + f"{a} × {b}" for (a, b), count in runs)])


def _compute(report: dict[str, Any]) -> Table:
    """Forms of the whole model and of its last replaced block."""
    dense = report["variants"][0]["forms"]["dense"]
    index = (report["request"]["blocks"] or [0])[-1]
    table = _table(
        "Multiply-adds per token",
        "model",
        "form",
        f"block {index}",
        "of dense",
        "whole model",
        "change",
        "linear weights",
    )
    for variant in report["variants"]:
        for name, form in variant["forms"].items():
            if name == "dense" and variant is not report["variants"][0]:
                continue
            block, before = form["block_macs"][index], dense["block_macs"][index]
            table.add_row(
                variant["name"],
                name,
                f"{block / 1e6:.2f} M",
                f"{100 * block / before:.2f} %",
                f"{form['macs_per_token'] / 1e9:.4f} G",
                _change(dense["macs_per_token"], form["macs_per_token"]),
                f"{form['linear_weights']:,}" if form["runs"] else "count only",
            )
    return table


def _memory(report: dict[str, Any]) -> Table:
    table = _table(
        "Inference memory in GB",
        "model",
        "form",
        "dtype",
        "weights",
        "cache",
        "activations",
        "scores",
        "prefill",
        "change",
        "step",
    )
    for dtype in report["kv_bytes_per_token"]:
        before = report["variants"][0]["memory"][dtype]["dense"]["prefill"]["total"]
        for variant in report["variants"]:
            for name, phases in variant["memory"][dtype].items():
                if name not in _SHOWN_FORMS or (name == "dense" and variant is not report["variants"][0]):
                    continue
                prefill = phases["prefill"]
                parts = (prefill[part] for part in ("weights", "kv_cache", "activations", "scores", "total"))
                table.add_row(
                    variant["name"],
                    name,
                    dtype,
                    *(f"{part / 1e9:.3f}" for part in parts),
                    _change(before, prefill["total"]),
                    f"{phases['decode']['total'] / 1e9:.3f}",
                )
    return table


def _paper(rows: list[dict[str, Any]]) -> Table:
    table = _table("The paper's table (arXiv:2605.25344v1) and what rebuilds it", "quantity", "", "before", "after", "")
    for row in rows:
        before, after = row["reported"]
        table.add_row(
            row["quantity"], f"reported, {row['unit']}", f"{before:.2f}", f"{after:.2f}", _change(before, after)
        )
        for name, (dense, mixt) in row["rebuilt"].items():
            table.add_row("", name, f"{dense:.2f}", f"{mixt:.2f}", _change(dense, mixt))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.2f} %".replace("-", "−")


def _ranges(numbers: list[int]) -> str:
    """``0, 3, 7–9`` for ascending numbers."""
    runs = []
    for _, run in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        block = [number for _, number in run]
        runs.append(str(block[0]) if len(block) == 1 else f"{block[0]}–{block[-1]}")
    return ", ".join(runs)
