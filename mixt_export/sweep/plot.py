"""sweep.png and sweep.svg: the figures of a sweep over the number of replaced blocks."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixt_export.optional import require
from mixt_export.sweep.options import variant_of

FILES = ("sweep.png", "sweep.svg")

#: Colours that readers with a colour vision deficiency tell apart (Okabe & Ito 2008), one a variant.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_GREY = "#808080"
#: Line styles of the domains of texts, and of two figures in one panel.
_STYLES = ("-", "--", ":")

Row = dict[str, Any]


def draw(data: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    """Draw ``data``, the content of sweep.json, into ``folder``; returns the files.

    Raises MissingDependencyError without matplotlib.
    """
    require("matplotlib", "Drawing a sweep")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flatten()
    for axis, panel in zip(axes, _PANELS, strict=True):
        panel(axis, data)
        axis.set_xlabel("replaced blocks, counted from the last")
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)
    settings = data["settings"]
    figure.suptitle(f"{settings['model']}: {settings['method']} in the last blocks", fontsize=11)
    paths = tuple(folder / name for name in FILES)
    for path in paths:
        content = io.BytesIO()
        # Without dates and random identifiers equal data give equal files.
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        with _stable_identifiers():
            figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=metadata)
        figure.set_layout_engine("none")  # laid out once, for both files
        path.write_bytes(content.getvalue())
    return paths


def _stable_identifiers() -> Any:
    return require("matplotlib", "Drawing a sweep").rc_context({"svg.hashsalt": "mixt-sweep"})


def _curves(data: dict[str, Any]) -> list[tuple[str, str, list[Row]]]:
    """(label, colour, rows by number of blocks) of every variant, the dense row first in each."""
    dense = [row for row in data["rows"] if row["variant"] is None]
    found: dict[str, list[Row]] = {}
    for row in data["rows"]:
        if row["variant"] is not None:
            found.setdefault(variant_of(row["variant"]).label, []).append(row)
    return [
        (label, _COLOURS[number % len(_COLOURS)], [*dense, *sorted(rows, key=lambda row: int(row["n_blocks"]))])
        for number, (label, rows) in enumerate(found.items())
    ]


def _at(*keys: str) -> Callable[[Row], float | None]:
    """Reads the entry of a row that ``keys`` lead to."""

    def read(row: Row) -> float | None:
        value: Any = row
        for key in keys:
            value = value[key]
        return None if value is None else float(value)

    return read


def _line(axis: Any, rows: list[Row], read: Callable[[Row], float | None], **style: Any) -> None:
    points = [(row["n_blocks"], read(row)) for row in rows]
    kept = [(x, y) for x, y in points if y is not None]
    axis.plot([x for x, _ in kept], [y for _, y in kept], marker="o", markersize=3, linewidth=1.4, **style)


def _by_domain(axis: Any, data: dict[str, Any], key: str) -> None:
    for label, colour, rows in _curves(data):
        for domain, style in zip(rows[0]["domains"], _STYLES, strict=False):
            _line(
                axis,
                rows,
                _at("domains", domain, key),
                color=colour,
                linestyle=style,
                label=f"{label}, {domain}",
            )


def _mark(axis: Any, data: dict[str, Any], figure: str) -> None:
    """A vertical line where ``figure`` has a clear transition."""
    colours = {label: colour for label, colour, _ in _curves(data)}
    for found in data["transitions"]:
        if found["clear"] and found["figure"].endswith(figure):
            axis.axvline(found["location"], color=colours[variant_of(found["variant"]).label], alpha=0.5, linewidth=1)


def _perplexity(axis: Any, data: dict[str, Any]) -> None:
    _by_domain(axis, data, "perplexity")
    _mark(axis, data, "log perplexity")
    axis.set_yscale("log")
    axis.set_title("perplexity", fontsize=10)


def _kl(axis: Any, data: dict[str, Any]) -> None:
    _by_domain(axis, data, "kl")
    _mark(axis, data, "KL")
    axis.set_title("KL from the dense model, nats", fontsize=10)


def _agreement(axis: Any, data: dict[str, Any]) -> None:
    _by_domain(axis, data, "agreement")
    axis.set_ylim(0, 1.02)
    axis.set_title("same top token as the dense model", fontsize=10)


def _accuracy(axis: Any, data: dict[str, Any]) -> None:
    for label, colour, rows in _curves(data):
        _line(axis, rows, _at("questions", "accuracy"), color=colour, label=label)
        low, high = ([row["questions"]["interval"][end] for row in rows] for end in (0, 1))
        axis.fill_between([row["n_blocks"] for row in rows], low, high, color=colour, alpha=0.12, linewidth=0)
    _mark(axis, data, "accuracy")
    questions = data["rows"][0]["questions"]
    axis.axhline(questions["chance"], color=_GREY, linestyle="--", linewidth=1, label="guessing")
    axis.set_ylim(0, 1)
    axis.set_title(f"accuracy, {questions['questions']} questions (smoke data), 95 % interval", fontsize=10)


def _entropies(axis: Any, data: dict[str, Any]) -> None:
    for label, colour, rows in _curves(data):
        for key, name, style in (("output_entropy", "OE", "-"), ("prediction_entropy", "PE", "--")):
            _line(
                axis,
                rows,
                _at("questions", key),
                color=colour,
                linestyle=style,
                label=f"{name}, {label}",
            )
    axis.set_ylim(-0.02, 1.05)
    axis.set_title("entropy of outputs (OE) and of predictions (PE)", fontsize=10)


def _drift(axis: Any, data: dict[str, Any]) -> None:
    for label, colour, rows in _curves(data):
        _line(axis, rows, _at("drift"), color=colour, label=label)
    _mark(axis, data, "drift")
    axis.set_title("drift of the inter-layer similarity", fontsize=10)


_PANELS: tuple[Callable[[Any, dict[str, Any]], None], ...] = (
    _perplexity,
    _kl,
    _agreement,
    _accuracy,
    _entropies,
    _drift,
)
