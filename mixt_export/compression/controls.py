"""What a compression is worth: its score on held-out texts beside those of the controls.

Controls: the original (``dense``), the chosen linears set to zero (``deleted``: what is left when the blocks lose
them), and low rank with no more parameters in any linear, made from the same tokens by the same passes (``low rank``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

#: Names of the scored variants; COMPRESSED is the model that is written.
DENSE, COMPRESSED, DELETED, LOW_RANK = "dense", "compressed", "deleted", "low rank"


@dataclass(frozen=True)
class Score:
    """``nll``: mean negative log likelihood in nats, ``kl``: mean KL(dense ‖ this) in nats, over the same tokens."""

    nll: float
    kl: float
    perplexity: float

    @classmethod
    def of(cls, nll: float, kl: float) -> Score:
        """With the perplexity exp(nll), capped where float64 ends."""
        return cls(nll, kl, math.exp(min(nll, 700.0)))


@dataclass(frozen=True)
class TextScores:
    """One held-out text: ``windows`` windows of ``window`` tokens, each token but the first of a window predicted."""

    text: str
    domain: str
    windows: int
    window: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Controls:
    """``texts``: the scores; ``params``: of the replaced linears in each variant; ``warnings``: one line each."""

    texts: tuple[TextScores, ...]
    params: Mapping[str, int]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, texts: tuple[TextScores, ...], params: Mapping[str, int], method: str) -> Controls:
        """With a warning for every control that the compressed model does not beat on some text."""
        warnings = []
        for control, advice in (
            (LOW_RANK, "a low rank method would serve better, or recover the model and compare again"),
            (DELETED, "the factors are worth nothing, take fewer tensors N_T or fewer blocks"),
        ):
            # not "<" rather than ">=": a model that gives no numbers is no better either
            lost = [scores for scores in texts if not scores.scores[COMPRESSED].nll < scores.scores[control].nll]
            if lost:
                where = ", ".join(
                    f"{scores.text} ({scores.scores[COMPRESSED].perplexity:.4g} against "
                    f"{scores.scores[control].perplexity:.4g})"
                    for scores in lost
                )
                warnings.append(
                    f"{method} is not better than the control '{control}' in perplexity on {where}: {advice}."
                )
        return cls(texts, params, tuple(warnings))
