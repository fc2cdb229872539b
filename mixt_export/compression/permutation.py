"""An order of the hidden channels of a gated MLP that brings gate and up closer to MixT, free at inference.

The function of down(act(gate x) · up x) does not change when the rows of gate and up and the columns of down are
permuted together. A MixT of S = d^(N-1) spectator slices does depend on the order: the output position (r₁, w, r₂),
r₁ and r₂ below S, shares rows of the cores with the S² positions of the same w, and with none of another. The least
squares of a weight W under a Gram G therefore falls apart into one problem per group w,

    captured energy = Σ_w || H^(-1/2) Σ_r A_rᵀ G m_(r,w) ||²,   H = Σ_r A_rᵀ G A_r,

with m_(r,w) the row of W that stands at role r = (r₁, r₂) of group w, and A_r (in, N·in) the map from the group's rows
of the cores to that row: groups whose members want the same rows of the cores keep more. It is raised by exchanging
neurons between groups, and the gain of one exchange is exact. Alternating between cores and assignment instead stops
at once, because cores that were fitted with a neuron in them favour its own place.

Only the exact form is permuted, not the paper's padded one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mixt_export.compression.roots import cholesky
from mixt_export.compression.statistics import Gram
from mixt_export.compression.tensor_mixture.moments import token_weights
from mixt_export.network import FactorizedLinear
from mixt_export.reference.tensor_mixture import MixTShape

#: Gate, up and down inside a decoder block, as transformers names them.
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

#: Ridge on H, times its mean diagonal: directions the tokens never visited say nothing about which neurons are alike.
_RIDGE = 1e-3
#: Rounds end when one raises the captured energy by less than this share.
_LEAST_GAIN = 2e-4

#: S² · hidden · in² of the largest weight that blocks are permuted for: minutes on a CPU, a GB of working memory.
MOST_WORK = 10**12


def ffn_permutation(
    weights: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
    shape: MixTShape,
    *,
    rounds: int = 10,
) -> torch.Tensor:
    """Order (hidden,) int64 in which the rows of ``weights`` come closest to MixT of ``shape``.

    ``weights``: gate and up (hidden, in), float32 or float64; ``grams``: of their inputs (in, in), weighted token by
    token as the closed form will weight them. The sum over both of captured over whole energy never falls: the identity
    is returned when nothing better is found, when ``shape`` is padded, or when S² does not divide the hidden features.
    Rows are to be taken as ``weight[order]``, columns of down as ``down[:, order]``. Deterministic.
    Raises CheckpointError when a Gram is not finite.
    """
    hidden = weights[0].shape[0]
    order = torch.arange(hidden)
    if shape.padded or hidden % shape.spectators**2:
        return order
    places = _Places.of(shape)
    problems = [_Problem.of(weight, gram, places) for weight, gram in zip(weights, grams, strict=True)]
    value = sum(problem.captured(order) for problem in problems)
    for _ in range(rounds):
        before = value
        swaps = _swaps(sum((problem.scores(order) for problem in problems), torch.zeros(())), order, places)
        while len(swaps):
            tried = order.clone()
            tried[swaps[:, 0]], tried[swaps[:, 1]] = order[swaps[:, 1]], order[swaps[:, 0]]
            reached = sum(problem.captured(tried) for problem in problems)
            if reached > value:
                order, value = tried, reached
                break
            swaps = swaps[: len(swaps) // 2]  # several exchanges in one group interact: fewer of them
        if value - before < _LEAST_GAIN * before:
            break
    return order


def permute_ffn(gate: nn.Linear, up: nn.Linear, down: nn.Linear, order: torch.Tensor) -> None:
    """Put the hidden channels of a gated MLP into ``order``; its function stays, to rounding.

    Parameters are replaced by new ones, never written to: others may share them.
    """
    for linear in (gate, up):
        linear.weight = nn.Parameter(linear.weight.detach()[order], linear.weight.requires_grad)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[order], linear.bias.requires_grad)
    down.weight = nn.Parameter(down.weight.detach()[:, order], down.weight.requires_grad)


@torch.no_grad()
def permute_block(
    block: nn.Module, linears: Mapping[str, FactorizedLinear], inputs: Iterable[torch.Tensor], *, rounds: int = 10
) -> bool:
    """Reorder the hidden channels of the gated MLP of ``block`` for what its linears become; whether it was done.

    ``linears``: what replaces each linear, by name inside the block; ``inputs``: what the MLP reads, (tokens, features)
    each, used only if needed. Nothing is done unless gate, up and down are all replaced, since a dense one would have
    to be stored anew, and gate and up alike, in the exact form and without bias; nor beyond MOST_WORK.
    """
    parts = [block.get_submodule(name) for name in GATED_MLP if name in linears]
    mlp = [part for part in parts if isinstance(part, nn.Linear)]
    if len(mlp) != len(GATED_MLP):
        return False
    gate, up, down = mlp
    shape, other = (MixTShape.of(linears[name]) for name in GATED_MLP[:2])
    if shape is None or shape != other or shape.padded or shape.out_features % shape.spectators**2:
        return False
    if any(linear.bias is not None for linear in (gate, up)):
        return False
    if shape.spectators**2 * shape.out_features * shape.in_features**2 > MOST_WORK:
        return False
    grams = {linear: Gram(linear.in_features) for linear in (gate, up)}
    for x in inputs:
        for linear, gram in grams.items():
            gram.add(x * token_weights(nn.functional.linear(x, linear.weight)).sqrt()[:, None])
    order = ffn_permutation((gate.weight, up.weight), [gram.mean() for gram in grams.values()], shape, rounds=rounds)
    permute_ffn(gate, up, down, order)
    return True


@dataclass(frozen=True)
class _Places:
    """Where a group's rows of the cores are read. ``roles`` = S²; positions count (role r₁, group w, role r₂).

    ``role``, ``group``: (hidden,) of each position. ``inputs``: (roles, N, in/S) inputs that branch k reads at a role;
    ``rows``: (roles, N) which of the group's S rows of core k it uses.
    """

    role: torch.Tensor
    group: torch.Tensor
    inputs: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, shape: MixTShape) -> _Places:
        """From the sizes of the MixT; the group index w is the middle of a core's row index in every branch."""
        spectators, hidden, features = shape.spectators, shape.out_features, shape.in_features
        groups = hidden // spectators**2
        position = torch.arange(hidden)
        head, tail = position // (groups * spectators), position % spectators
        group = position // spectators % groups
        width = features // spectators
        inputs = torch.empty(spectators**2, shape.terms, width, dtype=torch.int64)
        rows = torch.empty(spectators**2, shape.terms, dtype=torch.int64)
        for role in range(spectators**2):
            first, last = divmod(role, spectators)
            for k, (left, right) in enumerate(shape.splits):
                # the first k digits of r₁ and the last of r₂ are spectators; the others belong to the core's row
                outer, inner = first // right, last % right
                rows[role, k] = (first % right) * left + last // right
                inputs[role, k] = outer * width * right + torch.arange(width) * right + inner
        return cls(head * spectators + tail, group, inputs, rows)

    @property
    def columns(self) -> torch.Tensor:
        """(roles, N, in/S): column of H of each input that a role reads."""
        _, terms, width = self.inputs.shape
        start = (torch.arange(terms) * int(self.rows.max() + 1) + self.rows) * width
        return start[..., None] + torch.arange(width)


@dataclass(frozen=True)
class _Problem:
    """One weight. ``pulls``: G m of every neuron (hidden, in), scaled so that the whole energy is 1.

    ``factor``: Cholesky factor of H; ``metrics``: (roles, in, in) A_r H⁻¹ A_rᵀ.
    """

    places: _Places
    pulls: torch.Tensor
    factor: torch.Tensor
    metrics: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, gram: torch.Tensor, places: _Places) -> _Problem:
        """Raises CheckpointError when ``gram`` is not finite."""
        gram, weight = gram.double(), weight.detach().double()
        features = len(gram)
        columns = places.columns
        size = int(columns.max()) + 1
        normal = torch.zeros(size, size, dtype=torch.float64)
        for inputs, found in zip(places.inputs.flatten(1), columns.flatten(1), strict=True):
            normal[found[:, None], found[None, :]] += gram[inputs[:, None], inputs[None, :]]
        normal.diagonal().add_(_RIDGE * normal.diagonal().mean())
        factor = cholesky(normal)
        inverse = torch.cholesky_inverse(factor)
        metrics = torch.zeros(len(columns), features, features)
        for metric, inputs, found in zip(metrics, places.inputs, columns, strict=True):
            for one, at in zip(inputs, found, strict=True):
                for other, there in zip(inputs, found, strict=True):
                    metric[one[:, None], other[None, :]] += inverse[at[:, None], there[None, :]].float()
        pulls = weight @ gram
        energy = float((pulls * weight).sum())
        return cls(places, pulls / max(energy, 1e-300) ** 0.5, factor, metrics)

    def captured(self, order: torch.Tensor) -> float:
        """Share of the energy that the best cores keep when the neurons stand in ``order``."""
        sums = self._sums(order)
        return float(torch.linalg.solve_triangular(self.factor, sums.T, upper=False).square().sum())

    def scores(self, order: torch.Tensor) -> torch.Tensor:
        """(hidden neurons, hidden positions) float32: energy gained by a neuron at a position whose occupant left."""
        places, pulls = self.places, self.pulls.float()
        cores = torch.cholesky_solve(self._sums(order).T, self.factor).T.float()  # (groups, N·in)
        scores = torch.empty(len(order), len(order))
        for role, metric in enumerate(self.metrics):
            positions = (places.role == role).nonzero()[:, 0]
            weighted = pulls @ metric
            own = (weighted * pulls).sum(1)
            at = places.columns[role].flatten()
            fitted = torch.zeros(len(positions), pulls.shape[1])
            groups = places.group[positions]
            fitted.index_add_(1, places.inputs[role].flatten(), cores[groups][:, at])
            shared = pulls @ fitted.T - weighted @ pulls[order[positions]].T
            scores[:, positions] = own[:, None] + 2.0 * shared
        return scores

    def _sums(self, order: torch.Tensor) -> torch.Tensor:
        """Σ_r A_rᵀ G m_(r,w): (groups, N·in)."""
        places = self.places
        sums = torch.zeros(int(places.group.max()) + 1, len(self.factor), dtype=torch.float64)
        for role in range(len(self.metrics)):
            positions = (places.role == role).nonzero()[:, 0]
            standing = self.pulls[order[positions]][:, places.inputs[role].flatten()]
            at = places.columns[role].flatten()
            sums[places.group[positions][:, None], at[None, :]] += standing
        return sums


def _swaps(scores: torch.Tensor, order: torch.Tensor, places: _Places) -> torch.Tensor:
    """Disjoint exchanges (count, 2) of positions that raise the energy, the best first.

    Exact one by one between different groups; exchanges inside a group are left out.
    """
    placed = scores[order]  # [i, j]: the neuron now at position i, standing at position j
    change = placed - placed.diagonal()[:, None]
    change = change + change.T
    change[places.group[:, None] == places.group[None, :]] = -torch.inf
    best, partner = change.max(dim=1)
    free = torch.ones(len(order), dtype=torch.bool)
    chosen = []
    for position in torch.argsort(best, descending=True, stable=True).tolist():
        other = int(partner[position])
        if float(best[position]) <= 0.0:
            break
        if bool(free[position]) and bool(free[other]):
            free[position] = free[other] = False
            chosen.append((position, other))
    return torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
