"""Second moments that fit one linear to the outputs of the original, every token weighted by the size of its output.

First tokens of a window have activations tens of times the usual in late blocks. In an unweighted Gram they outweigh
all others together; low rank can spend one direction on them, MixT cannot, and fits nothing else. With weights
1/||W x||² the loss is the mean over tokens of the relative squared error, and each token counts the same.
"""

from __future__ import annotations

import torch

from mixt_export.compression.statistics import Gram

#: Outputs below this share of the batch's mean square count as if they had it: a token without output has no ratio.
_FLOOR = 1e-6


def token_weights(outputs: torch.Tensor) -> torch.Tensor:
    """1/||y||² for each row y of ``outputs`` (tokens, out); 1 for all where no row has any. (tokens,) float32."""
    squares = outputs.square().sum(1)
    floor = _FLOOR * float(squares.mean())
    return torch.ones_like(squares) if floor == 0.0 else 1.0 / squares.clamp_min(floor)


class Moments:
    """``cross`` C = mean w y xᵀ (out, in), ``gram`` G = mean w x xᵀ (in, in), ``energy`` mean w ||y||²; float64."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self._cross = torch.zeros(out_features, in_features, dtype=torch.float64)
        self._gram = Gram(in_features)
        self._energy = 0.0

    def add(self, outputs: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens: wanted ``outputs`` (tokens, out), ``inputs`` (tokens, in) of the replacement, ``weights``."""
        roots = weights.sqrt()[:, None]
        weighted, wanted = inputs * roots, outputs * roots
        self._gram.add(weighted)
        self._cross += (wanted.T @ weighted).double()
        self._energy += float(wanted.double().square().sum())

    @property
    def cross(self) -> torch.Tensor:
        """C."""
        return self._cross / max(1, self._gram.count)

    @property
    def gram(self) -> torch.Tensor:
        """G."""
        return self._gram.mean()

    @property
    def energy(self) -> float:
        """What errors are relative to."""
        return self._energy / max(1, self._gram.count)

    def error(self, product: torch.Tensor) -> float:
        """mean w ||y - W' x||² / mean w ||y||² of ``product`` W' (out, in) float64; 0 without any output."""
        if self.energy <= 0.0:
            return 0.0
        mixed = float((product * self.cross).sum())
        own = float(((product @ self.gram) * product).sum())
        return max(0.0, (self.energy - 2 * mixed + own) / self.energy)
