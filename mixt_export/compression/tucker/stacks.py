"""What is decomposed together: the heads of an attention, gate and up of an MLP, or one linear alone.

A stack arranges the weights of its linears as one tensor, whose first axes (``sizes``) may get a factor each; the later
axes run over ``copies`` of a core. A rank as large as its axis means no factor: the core then has the axis itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from mixt_export.compression.tucker.decomposition import Bases, Tucker, hooi, hosvd, rebuilt
from mixt_export.network import FactorizedLinear, build

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Solution:
    """``tensors``: name -> float64 values of every core; ``rebuilt``: the stacked tensor they stand for, float64.

    ``errors``: ||W - W'||² / ||W||² of all linears together, of the HOSVD and after every sweep.
    """

    tensors: Mapping[str, torch.Tensor]
    rebuilt: torch.Tensor
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Stack(ABC):
    """``members``: the role of each linear in the stack -> its path; ``shared``: prefix of the tensors they share."""

    members: Mapping[str, str]
    shared: str

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """The axes that may get a factor."""

    @property
    @abstractmethod
    def copies(self) -> int:
        """Product of the axes that may not."""

    @abstractmethod
    def tensor(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The stacked tensor (``sizes``, later axes) of the weights (out, in) by path."""

    @abstractmethod
    def matrices(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inverse of ``tensor``: path -> (out, in)."""

    @abstractmethod
    def linears(self, ranks: Ranks, dtype: str) -> dict[str, FactorizedLinear]:
        """Path -> network of every member, without biases."""

    @abstractmethod
    def named(self, result: Tucker, ranks: Ranks) -> dict[str, torch.Tensor]:
        """Tensor name -> values of all networks of ``linears``; ``result.core`` has the axes of ``tensor``."""

    @property
    def dense(self) -> int:
        """Parameters of the weights."""
        return prod(self.sizes) * self.copies

    def parameters(self, ranks: Ranks) -> int:
        """Π R_k · copies + Σ n_k R_k over the axes with a factor."""
        factors = sum(size * rank for size, rank in zip(self.sizes, ranks, strict=True) if rank < size)
        return prod(ranks) * self.copies + factors

    def solve(self, tensor: torch.Tensor, ranks: Ranks, bases: Bases | None, tolerance: float, sweeps: int) -> Solution:
        """HOOI of the axes with a factor, from the HOSVD (``bases``, computed when None)."""
        axes = [axis for axis, size in enumerate(self.sizes) if ranks[axis] < size]
        order = [*axes, *(axis for axis in range(tensor.ndim) if axis not in axes)]
        chosen = [ranks[axis] for axis in axes]
        moved = tensor.permute(order)
        start = (
            hosvd(moved, len(axes)).truncated(chosen)
            if bases is None
            else tuple(bases.factors[axis][:, : ranks[axis]] for axis in axes)
        )
        found = hooi(moved, start, tolerance=tolerance, sweeps=sweeps)
        back = [order.index(axis) for axis in range(tensor.ndim)]
        result = Tucker(found.factors, found.core.permute(back), found.errors)
        return Solution(self.named(result, ranks), rebuilt(found).permute(back), found.errors)


@dataclass(frozen=True)
class HeadStack(Stack):
    """Heads of some of q, k, v, o: tensor (features, head_dim, slices, kv heads), TensorLLM's with a slice for each.

    With fewer kv heads than heads every kv head is stacked with the r query heads that read it: q and o have r slices
    each, k and v one, 2r + 2 together. No head is repeated, and k and v keep one matrix per kv head, as their cache.
    """

    features: int
    head_dim: int
    heads: int
    kv_heads: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """See Stack."""
        return self.features, self.head_dim, sum(map(self._slices, self.members))

    @property
    def copies(self) -> int:
        """See Stack."""
        return self.kv_heads

    def tensor(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See Stack."""
        parts = []
        for role, name in self.members.items():
            rows = weights[name].T if role == "o" else weights[name]
            parts.append(rows.reshape(self.kv_heads, self._slices(role), self.head_dim, self.features))
        return torch.cat(parts, dim=1).permute(3, 2, 1, 0)

    def matrices(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """See Stack."""
        parts = torch.split(tensor.permute(3, 2, 1, 0), [self._slices(role) for role in self.members], dim=1)
        found = {}
        for (role, name), part in zip(self.members.items(), parts, strict=True):
            rows = part.reshape(-1, self.features)
            found[name] = rows.T if role == "o" else rows
        return found

    def linears(self, ranks: Ranks, dtype: str) -> dict[str, FactorizedLinear]:
        """See Stack."""
        r1, r2, r3 = (rank if rank < size else None for rank, size in zip(ranks, self.sizes, strict=True))
        return {
            name: build.tucker_heads(
                name,
                role,
                self.features,
                self.heads,
                self.head_dim,
                (r1, r2, r3),
                shared=self.shared,
                kv_heads=self.kv_heads,
                dtype=dtype,
            )
            for role, name in self.members.items()
        }

    def named(self, result: Tucker, ranks: Ranks) -> dict[str, torch.Tensor]:
        """See Stack."""
        factors = iter(result.factors)
        u1, u2, u3 = (next(factors) if rank < size else None for rank, size in zip(ranks, self.sizes, strict=True))
        found = {f"{self.shared}.{name}": u for name, u in (("u1", u1), ("u2", u2)) if u is not None}
        core = result.core.permute(0, 3, 1, 2)  # (features, kv heads, head_dim, slices)
        starts, start = {}, 0
        for role in self.members:
            starts[role] = slice(start, start + self._slices(role))
            start += self._slices(role)
        if u3 is not None:
            found[f"{self.shared}.core"] = core
            for role, rows in starts.items():
                found[f"{self.shared}.u3.{role}"] = u3[rows] if self._grouped(role) else u3[rows][0]
            return found
        for role, rows in starts.items():
            own = core[..., rows].permute(0, 1, 3, 2)  # (features, kv heads, slices, head_dim)
            own = own.permute(1, 2, 3, 0) if role == "o" else own
            found[f"{self.shared}.core.{role}"] = own if self._grouped(role) else own.squeeze(1 if role == "o" else 2)
        return found

    def _slices(self, role: str) -> int:
        return self.heads // self.kv_heads if role in "qo" else 1

    def _grouped(self, role: str) -> bool:
        return self._slices(role) > 1


@dataclass(frozen=True)
class GatedStack(Stack):
    """Gate and up of a gated MLP: tensor (in, out, 2), shared factors of both features, a core each (TT-LLM)."""

    in_features: int
    out_features: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """See Stack."""
        return self.in_features, self.out_features

    @property
    def copies(self) -> int:
        """See Stack."""
        return len(self.members)

    def tensor(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See Stack."""
        return torch.stack([weights[name].T for name in self.members.values()], dim=2)

    def matrices(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """See Stack."""
        return {name: tensor[:, :, index].T for index, name in enumerate(self.members.values())}

    def linears(self, ranks: Ranks, dtype: str) -> dict[str, FactorizedLinear]:
        """See Stack."""
        in_rank, out_rank = (rank if rank < size else None for rank, size in zip(ranks, self.sizes, strict=True))
        return {
            name: build.tucker2(
                name,
                self.in_features,
                self.out_features,
                in_rank,
                out_rank,
                dtype=dtype,
                names=self._names(name, ranks),
                method="tucker",
            )
            for name in self.members.values()
        }

    def named(self, result: Tucker, ranks: Ranks) -> dict[str, torch.Tensor]:
        """See Stack."""
        found: dict[str, torch.Tensor] = {}
        for index, name in enumerate(self.members.values()):
            factors = iter(result.factors)
            first = [next(factors)] if ranks[0] < self.sizes[0] else []
            last = [next(factors).T] if ranks[1] < self.sizes[1] else []
            values = (*first, result.core[:, :, index], *last)
            found.update(zip(self._names(name, ranks), values, strict=True))
        return found

    def _names(self, name: str, ranks: Ranks) -> Sequence[str]:
        first = [f"{self.shared}.u1"] if ranks[0] < self.sizes[0] else []
        last = [f"{self.shared}.u2"] if ranks[1] < self.sizes[1] else []
        return [*first, f"{name}.core", *last]


@dataclass(frozen=True)
class SingleStack(Stack):
    """One linear. The Tucker form of a matrix is its truncated SVD: the core merges into a factor, which saves it."""

    in_features: int
    out_features: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """See Stack."""
        return (min(self.in_features, self.out_features),)

    @property
    def copies(self) -> int:
        """See Stack."""
        return max(self.in_features, self.out_features)

    def parameters(self, ranks: Ranks) -> int:
        """R (in + out)."""
        return ranks[0] * (self.in_features + self.out_features) if ranks != self.sizes else self.dense

    def tensor(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See Stack."""
        (name,) = self.members.values()
        return weights[name] if self.out_features <= self.in_features else weights[name].T

    def matrices(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """See Stack."""
        (name,) = self.members.values()
        return {name: tensor if self.out_features <= self.in_features else tensor.T}

    def linears(self, ranks: Ranks, dtype: str) -> dict[str, FactorizedLinear]:
        """See Stack."""
        (name,) = self.members.values()
        return {name: build.low_rank(name, self.in_features, self.out_features, ranks[0], dtype=dtype, method="tucker")}

    def named(self, result: Tucker, ranks: Ranks) -> dict[str, torch.Tensor]:
        """See Stack."""
        (name,) = self.members.values()
        (basis,), core = result.factors, result.core  # (small, R), (R, large)
        norms = core.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        left, right = basis * norms, core / norms[:, None]  # the gauge is free: both factors get the same norms
        down, up = (right.T, left.T) if self.out_features <= self.in_features else (left, right)
        return {f"{name}.core0": down, f"{name}.core1": up}
