"""How good a model is on a text: perplexity, and how far it is from another model."""

from mixt_export.evaluation.perplexity import TextScore, perplexity
from mixt_export.evaluation.scorers import Scorer, open_scorer

__all__ = ["Scorer", "TextScore", "open_scorer", "perplexity"]
