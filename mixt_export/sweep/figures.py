"""From what was measured to the rows and derived figures of sweep.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mixt_export.evaluation.diagnostics import drift, drift_by_layer, layer_similarity, mean_over_pairs
from mixt_export.evaluation.multiple_choice import summarise
from mixt_export.evaluation.transition import find_transition
from mixt_export.sweep.material import Material
from mixt_export.sweep.measure import Measured, TextFigures
from mixt_export.sweep.options import Variant
from mixt_export.sweep.record import Record, Row


@dataclass(frozen=True)
class Size:
    """Stored parameters of a model, those tied counted once, and their bytes."""

    params: int
    nbytes: int


def make_row(
    variant: Variant | None,
    blocks: int,
    size: Size,
    dense_size: Size,
    measured: Measured,
    dense: Measured,
    material: Material,
    cpu_seconds: dict[str, float],
) -> Row:
    """One row of sweep.json (docs/sweep.md says what each key means)."""
    texts = {text.name: _text(figures) for text, figures in zip(material.texts, measured.texts, strict=True)}
    domains = {
        domain: _text(
            _sum([one for text, one in zip(material.texts, measured.texts, strict=True) if text.domain == domain])
        )
        for domain in dict.fromkeys(text.domain for text in material.texts)
    }
    labels, dense_labels = measured.probabilities.argmax(axis=-1), dense.probabilities.argmax(axis=-1)
    similarity, original = layer_similarity(measured.states), layer_similarity(dense.states)
    return {
        "variant": None if variant is None else variant.to_dict(),
        "n_blocks": blocks,
        "params": size.params,
        "params_share": size.params / dense_size.params,
        "bytes": size.nbytes,
        "texts": texts,
        "domains": domains,
        "questions": {
            **asdict(summarise(measured.probabilities, [question.answer for question in material.questions])),
            "same_choice_as_dense": float((labels == dense_labels).mean()),
            "label_mass": measured.mass,
        },
        "similarity": mean_over_pairs(similarity),
        "drift": drift(similarity, original),
        "drift_by_layer": drift_by_layer(similarity, original).tolist(),
        "cpu_seconds": {stage: round(seconds, 2) for stage, seconds in cpu_seconds.items()},
    }


def _text(figures: TextFigures) -> dict[str, Any]:
    nll = figures.nll / figures.tokens
    return {
        "tokens": figures.tokens,
        "nll": nll,
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "kl": figures.kl / figures.tokens,
        "agreement": figures.agreed / figures.tokens,
    }


def _sum(parts: Sequence[TextFigures]) -> TextFigures:
    return TextFigures(
        sum(part.tokens for part in parts),
        sum(part.nll for part in parts),
        sum(part.kl for part in parts),
        sum(part.agreed for part in parts),
    )


#: Figure of a row whose transition is looked for -> how to read it for a domain, and whether more of it is worse.
PER_DOMAIN: dict[str, tuple[str, int]] = {"log perplexity": ("nll", 1), "KL": ("kl", 1)}
PER_ROW: dict[str, tuple[Callable[[Row], float | None], int]] = {
    "accuracy": (lambda row: _number(row["questions"]["accuracy"]), -1),
    "drift": (lambda row: _number(row["drift"]), 1),
}


def transitions(record: Record) -> dict[str, Any]:
    """``{"transitions": [...]}``: for every variant and figure what find_transition says over the number of blocks."""
    found = []
    for variant in record.variants():
        rows = record.curve(variant)
        counts = [int(row["n_blocks"]) for row in rows]
        curves: list[tuple[str, int, list[float | None]]] = [
            (f"{domain} {name}", worse, [_number(row["domains"][domain][key]) for row in rows])
            for domain in rows[0]["domains"]
            for name, (key, worse) in PER_DOMAIN.items()
        ]
        curves += [(name, worse, [read(row) for row in rows]) for name, (read, worse) in PER_ROW.items()]
        for name, worse, values in curves:
            y = [np.nan if value is None else value for value in values]
            found.append(
                {"variant": variant.to_dict(), "figure": name, **asdict(find_transition(counts, y, worse=worse))}
            )
    return {"transitions": found}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
