"""What the command line says of executable forms: as planned, and as a written graph executes them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

_FORM = {"method", "in_features", "out_features", "form", "macs", "transposes", "reason"}
_WIDEST = 1000
_LAYER = re.compile(r"\.(\d+)(?=[./])")


def linears_line(linears: Any) -> str:
    """How many linears the manifest's ``linears`` says take which form."""
    entries = linears.values() if isinstance(linears, dict) else ()
    counts = Counter(str(entry.get("form")) for entry in entries if isinstance(entry, dict))
    return ", ".join(f"{count} × {form}" for form, count in counts.items())


def clean(value: Any, longest: int = _WIDEST) -> str:
    """Text from a file, safe for a terminal: no control characters, not too long."""
    text = "".join(letter if letter.isprintable() else "�" for letter in str(value))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def plan_lines(plan: Any) -> Iterator[str]:
    """The manifest's ``plan`` as text, `clean`, equal decisions on one line; nothing where there is none."""
    return map(clean, _plan_lines(plan))


def work_lines(work: Any) -> Iterator[str]:
    """Multiply-adds per token of the nodes of a written graph, `clean`, equal nodes of all layers on one line."""
    return map(clean, _work_lines(work))


def _plan_lines(plan: Any) -> Iterator[str]:
    if not _is_plan(plan):
        return
    planned, stored, dense = (plan["elements"][key] for key in ("planned", "stored", "dense"))
    yield (
        f"factorised linears, optimised for {plan['optimize_for']} on {plan['device']}: {planned:,} weights in the "
        f"graph, {stored:,} stored, {dense:,} dense"
    )
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name, form in plan["forms"].items():
        what = f"{form['method']} {form['in_features']}→{form['out_features']}: {form['form']}"
        work = f"{form['macs']:,} MACs, {form['transposes']} transposes"
        reason = str(form["reason"])
        if "many" in form:
            what += f" or {form['many']}"
            work += f" or {form.get('many_macs')} MACs"
            reason += f"; {form.get('many_reason')}"
        alike.setdefault((what, work, reason), []).append(name.rpartition(".")[2])
    for (what, work, reason), names in alike.items():
        yield f"  {what} × {len(names)} ({', '.join(dict.fromkeys(names))}), {work}: {reason}"


def _work_lines(work: Any) -> Iterator[str]:
    """By module."""
    if work is None:
        return
    if isinstance(work, str):
        yield f"multiply-adds of the graph: unknown, {work}"
        return
    total = sum(node["macs"] for node in work)
    yield f"multiply-adds per token that the nodes of the layers execute, attention itself left out: {total:,}"
    facts = ("operator", "macs", "transposes")
    counts = Counter((_LAYER.sub(".*", node["name"]), *(node[fact] for fact in facts)) for node in work)
    modules: dict[str, list[str]] = {}
    sums: Counter[str] = Counter()
    for (name, operator, macs, transposes), count in counts.items():
        module, _, leaf = name.removesuffix("/MatMul").rpartition("/")
        moved = f", {transposes} transposes" if transposes else ""
        modules.setdefault(module, []).append(f"    {leaf} × {count}: {macs:,} ({operator}{moved})")
        sums[module] += macs * count
    layers = max(counts.values(), default=1)
    for module, lines in modules.items():
        yield f"  {module}: {sums[module] / 1e6:,.3f} M in all, {sums[module] / layers / 1e6:,.3f} M per layer"
        yield from lines


def _is_plan(plan: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether ``plan`` has what `plan_lines` reads: the manifest of a folder from elsewhere may hold anything."""
    if not isinstance(plan, dict) or not {"optimize_for", "device", "elements", "forms"} <= plan.keys():
        return False
    elements, forms = plan["elements"], plan["forms"]
    if not isinstance(elements, dict) or not isinstance(forms, dict):
        return False
    sizes = [elements.get(key) for key in ("planned", "stored", "dense")]
    return all(isinstance(size, int) for size in sizes) and all(
        isinstance(form, dict) and form.keys() >= _FORM and isinstance(form["macs"], int) for form in forms.values()
    )
