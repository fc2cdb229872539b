"""The optimiser of refinement and recovery: Muon for matrices, Adam for the rest, with a state that can be stored.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum M of a matrix by the nearest
orthogonal matrix, U V^T of its singular value decomposition, approximated by a few Newton-Schulz iterations.
Every direction of a factor then moves equally far however badly the inputs of its linear are scaled; with Adam the few
directions that carry almost all of the input's energy decide the step. Here a step has the length rate · ||T_0||_F:
relative to the factor it starts from, so that one rate serves factors of any scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

#: Coefficients of the quintic Newton-Schulz iteration (from the reference implementation) and how often it runs: three
#: times instead of five, which lets a twentieth of the largest singular value come near 1, at half the work.
_QUINTIC, _ITERATIONS = (3.4445, -4.7750, 2.0315), 3
_MOMENTUM = 0.9
#: Added to squared norms, so that a zero gradient gives a zero step.
_TINY = 1e-30
_BETAS, _EPSILON = (0.9, 0.95), 1e-8


class Optimiser:
    """Steps of ``parameters`` (by name) from their gradients; those with two axes are matrices, any other vectors.

    ``matrix_rate``: length of a matrix's step over its norm at the start; ``vector_rate``: Adam's learning rate, for
    parameters with one axis times their root mean square at the start: weights of norms are 0.02 in a first block and 2
    behind the last, and a step that suits the one destroys the other.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], matrix_rate: float, vector_rate: float) -> None:
        self.parameters = dict(parameters)
        self.matrix_rate, self.vector_rate = matrix_rate, vector_rate
        self.steps = 0
        self._lengths = {
            name: float(value.detach().norm()) or 1.0 for name, value in self.parameters.items() if value.ndim == 2
        }
        self._scales = {
            name: float(value.detach().square().mean().sqrt()) or 1.0
            for name, value in self.parameters.items()
            if value.ndim == 1
        }
        self._first = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self._second = {name: torch.zeros_like(value) for name, value in self.parameters.items() if value.ndim != 2}

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One update with both rates times ``share``; gradients are forgotten."""
        self.steps += 1
        vectors = [self.parameters[name] for name in self._second]
        nn.utils.clip_grad_norm_(vectors, 1.0)
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name in self._second:
                self._adam(name, parameter, parameter.grad, share)
            else:
                self._muon(name, parameter, parameter.grad, share)
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything but ``steps`` that the next step depends on, by name; copies."""
        lengths = {f"length:{name}": torch.tensor(value, dtype=torch.float64) for name, value in self._lengths.items()}
        scales = {f"scale:{name}": torch.tensor(value, dtype=torch.float64) for name, value in self._scales.items()}
        first = {f"first:{name}": value.clone() for name, value in self._first.items()}
        second = {f"second:{name}": value.clone() for name, value in self._second.items()}
        return {**lengths, **scales, **first, **second}

    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Go on from what ``tensors`` gave after ``steps`` steps."""
        self.steps = steps
        self._lengths = {name: float(tensors[f"length:{name}"]) for name in self._lengths}
        self._scales = {name: float(tensors[f"scale:{name}"]) for name in self._scales}
        self._first = {name: tensors[f"first:{name}"].clone() for name in self._first}
        self._second = {name: tensors[f"second:{name}"].clone() for name in self._second}

    def _muon(self, name: str, parameter: nn.Parameter, gradient: torch.Tensor, share: float) -> None:
        momentum = self._first[name].mul_(_MOMENTUM).add_(gradient)
        direction = orthogonalised(torch.add(gradient, momentum, alpha=_MOMENTUM))
        length = self.matrix_rate * share * self._lengths[name]
        parameter.sub_(direction, alpha=length / max(float(direction.norm()), _EPSILON))

    def _adam(self, name: str, parameter: nn.Parameter, gradient: torch.Tensor, share: float) -> None:
        first = self._first[name].lerp_(gradient, 1 - _BETAS[0])
        second = self._second[name].lerp_(gradient.square(), 1 - _BETAS[1])
        scale = (second / (1 - _BETAS[1] ** self.steps)).sqrt_().add_(_EPSILON)
        rate = self.vector_rate * self._scales.get(name, 1.0)
        parameter.sub_(first / scale, alpha=rate * share / (1 - _BETAS[0] ** self.steps))


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """About U Vᵀ of the singular value decomposition of ``matrix``.

    Singular values from a tenth of the largest on become 0.7 to 1.2, smaller ones stay smaller. The iteration starts
    from ``matrix`` over ||G||_F^½, a bound of its largest singular value that is tighter than ||matrix||_F.
    Every iterate of Newton-Schulz is a polynomial of the smaller Gram matrix G times ``matrix``. So the polynomial is
    evaluated on G, at a third of the work where the longer side is five times the shorter one, and multiplied once.
    With more iterations than _ITERATIONS this would need float32 products: errors of G's powers grow with them.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.mT if wide else matrix.mT @ matrix
    scale = gram.norm() + _TINY
    polynomial: torch.Tensor = _newton_schulz(gram / scale) / scale.sqrt()
    return polynomial @ matrix if wide else matrix @ polynomial


def _newton_schulz(gram: torch.Tensor) -> torch.Tensor:
    """The symmetric Q with Q X = the last iterate from X, by G = X Xᵀ with eigenvalues up to 1."""
    a, b, c = _QUINTIC
    product: torch.Tensor | None = None
    for iteration in range(_ITERATIONS):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if iteration + 1 < _ITERATIONS:
            gram = factor @ (factor @ gram)
    assert product is not None
    return product
