"""Diagnostics of a compressed model on multiple-choice questions: entropies of answers, similarity of layers.

As the MixT paper defines them (arXiv 2605.25344, Methods): OE is the mean entropy of the probabilities over the
options, PE the entropy of the frequencies of the predicted labels, both over log of the number of options; S(l, l')
is the mean cosine of the hidden states of two layers at the answer position, drift its change |S_NB − S_0|.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def entropy(probabilities: NDArray[np.floating]) -> Floats:
    """Shannon entropy in nats over the last axis of ``probabilities`` (…, n) that sum to one; 0 log 0 is 0."""
    p = probabilities.astype(np.float64)
    terms: Floats = p * np.log(np.where(p == 0.0, 1.0, p))  # NaN stays NaN
    total: Floats = 0.0 - terms.sum(axis=-1)
    return total


def output_entropy(probabilities: NDArray[np.floating]) -> float:
    """OE: mean over questions of H(p) / log n for ``probabilities`` (questions, n). 1: undecided, 0: certain."""
    return float(entropy(probabilities).mean()) / math.log(probabilities.shape[-1])


def prediction_entropy(labels: NDArray[np.integer], options: int) -> float:
    """PE: H(frequencies of ``labels`` (questions,), numbers below ``options``) / log options. 0: always one label."""
    frequencies = np.bincount(labels, minlength=options) / len(labels)
    return float(entropy(frequencies)) / math.log(options)


def layer_similarity(states: NDArray[np.floating]) -> Floats:
    """S (layers, layers): mean over questions of the cosine of ``states`` (questions, layers, hidden) of two layers."""
    values = states.astype(np.float64)
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    unit = np.divide(values, norms, out=np.zeros_like(values), where=norms != 0.0)
    similarity: Floats = np.matmul(unit, unit.transpose(0, 2, 1)).mean(axis=0)
    return similarity


def mean_over_pairs(matrix: Floats) -> float:
    """Mean of the entries l < l' of ``matrix`` (layers, layers)."""
    return float(matrix[np.triu_indices(len(matrix), k=1)].mean())


def drift_by_layer(similarity: Floats, original: Floats) -> Floats:
    """For each layer l' but the first: mean over l < l' of |S(l, l') − S_0(l, l')|; both are (layers, layers)."""
    change = np.abs(similarity - original)
    return np.array([change[:layer, layer].mean() for layer in range(1, len(change))])


def drift(similarity: Floats, original: Floats) -> float:
    """Mean over all pairs l < l' of |S(l, l') − S_0(l, l')|."""
    return mean_over_pairs(np.abs(similarity - original))
