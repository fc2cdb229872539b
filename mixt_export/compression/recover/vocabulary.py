"""KL(teacher ‖ student) on a part of the vocabulary.

A step looks at K tokens that are always there (weight 1) and at M others drawn uniformly with replacement from the R
that are left (weight R/M). With weights w and logits z, Σ_i w_i exp(z_i) is an unbiased estimate of the softmax
denominator, of the teacher's and of the student's with the same draw. So log w_i is added to both models' logits, and
the loss is the divergence of the two distributions over the K + M entries; with R ≤ M the whole vocabulary is taken and
it is exact. Among the K are the tokens with the largest mean probability under the teacher, the true next tokens of the
batch, and at every position the tokens that the teacher thinks likeliest: what is left to draw from has little mass.
"""

from __future__ import annotations

import math

import torch


class Vocabulary:
    """``common``: token ids that every step uses. ``size``: of the whole vocabulary. ``others``: M."""

    def __init__(self, common: torch.Tensor, size: int, others: int) -> None:
        self.common, self.size, self.others = common, size, others

    def draw(self, wanted: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of one step, ``common`` and ``wanted`` (any shape) first, and log weights of the same length."""
        always = torch.zeros(self.size, dtype=torch.bool)
        always[self.common] = True
        always[wanted.reshape(-1).long()] = True
        kept, left = always.nonzero()[:, 0], (~always).nonzero()[:, 0]
        if len(left) <= self.others:
            return torch.arange(self.size), torch.zeros(self.size)
        drawn = left[torch.randint(len(left), (self.others,), generator=generator)]
        weights = torch.zeros(len(kept) + self.others)
        weights[len(kept) :] = math.log(len(left) / self.others)
        return torch.cat([kept, drawn]), weights


def divergence(teacher: torch.Tensor, student: torch.Tensor, log_weights: torch.Tensor | None = None) -> torch.Tensor:
    """KL(teacher ‖ student) in nats per row of two sets of logits (tokens, entries): (tokens,)."""
    if log_weights is not None:
        teacher, student = teacher + log_weights, student + log_weights
    wanted, found = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (wanted.exp() * (wanted - found)).sum(-1)
