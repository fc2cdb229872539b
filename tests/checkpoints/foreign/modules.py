"""What the authors' modules compute, written from the formats' descriptions; nothing here reads a checkpoint.

Names of submodules and parameters are those of the authors, so that state_dict() names tensors as their code does.
"""

from __future__ import annotations

import torch
from torch import nn


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter drawn anew, so that the product of the factors keeps the size of its input."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan = parameter.shape[-1] if parameter.ndim > 1 else 10
        scale = 0.3 if name.endswith("bias") else 1.2 / fan**0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return module.requires_grad_(False)


class ABLinear(nn.Module):
    """y = ALinear(BLinear(x)) (LowRankArena, ASVD)."""

    def __init__(self, inner: int, outer: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.BLinear = nn.Linear(inner, rank, bias=False)
        self.ALinear = nn.Linear(rank, outer, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ALinear(self.BLinear(x))


class DobiLinear(nn.Module):
    """y = BLinear(ALinear(x)) (Dobi-SVD)."""

    def __init__(self, inner: int, outer: int, rank: int, bias: bool) -> None:
        super().__init__()
        assert not bias
        self.ALinear = nn.Linear(inner, rank, bias=False)
        self.BLinear = nn.Linear(rank, outer, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.BLinear(self.ALinear(x))


class UVLinear(nn.Module):
    """y = u_proj(v_proj(x)) (SVD-LLM's Hugging Face export, ZS-SVD)."""

    def __init__(self, inner: int, outer: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.v_proj = nn.Linear(inner, rank, bias=False)
        self.u_proj = nn.Linear(rank, outer, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.u_proj(self.v_proj(x))


class Conv1D(nn.Module):
    """GPT-2's linear: y = x W + b with W (in, out)."""

    def __init__(self, inner: int, outer: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, outer))
        self.bias = nn.Parameter(torch.empty(outer)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class ABConv1D(nn.Module):
    """ABLinear in place of a Conv1D: both factors stored (in, out)."""

    def __init__(self, inner: int, outer: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.BLinear = Conv1D(inner, rank, False)
        self.ALinear = Conv1D(rank, outer, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ALinear(self.BLinear(x))


class BlastLinear(nn.Module):
    """Blocks W_ij = B_i diag(D_ij) C_j, i of b1 rows, j of b2 columns of blocks (BLAST, eq. 2)."""

    def __init__(self, inner: int, outer: int, rank: int, bias: bool, blocks: tuple[int, int]) -> None:
        super().__init__()
        b1, b2 = blocks
        self.B = nn.Parameter(torch.empty(b1, outer // b1, rank))
        self.C = nn.Parameter(torch.empty(b2, rank, inner // b2))
        self.D = nn.Parameter(torch.empty(b1, b2, rank))
        if bias:
            self.bias = nn.Parameter(torch.empty(outer))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [
            torch.cat([b @ torch.diag(d) @ c for d, c in zip(ds, self.C, strict=True)], dim=1)
            for b, ds in zip(self.B, self.D, strict=True)
        ]
        return nn.functional.linear(x, torch.cat(rows), self.bias)


class TTLinear(nn.Module):
    """W[o1…od, i1…id] = G1[:, o1, i1, :] · … · Gd[:, od, id, :] (TT-LLM)."""

    def __init__(self, inner: tuple[int, ...], outer: tuple[int, ...], ranks: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        bonds = (1, *ranks, 1)
        shapes = [(bonds[k], outer[k], inner[k], bonds[k + 1]) for k in range(len(inner))]
        self.tt_cores = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])
        if bias:
            self.bias = nn.Parameter(torch.empty(torch.tensor(outer).prod()))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = torch.ones(1, 1, 1)
        for core in self.tt_cores:
            matrix = torch.einsum("abr,roix->aobix", matrix, core)
            matrix = matrix.reshape(matrix.shape[0] * core.shape[1], -1, core.shape[3])
        return nn.functional.linear(x, matrix[..., 0], self.bias)


class Shared(nn.Module):
    """Coefficients over a basis that is a module of its own (Basis Sharing)."""

    def __init__(self, basis: nn.Linear, coefficient: nn.Linear) -> None:
        super().__init__()
        self.basis, self.coefficient = basis, coefficient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.coefficient(self.basis(x))


class Lora(nn.Module):
    """y = base(x) + scale · B(A(x)) (LoRA)."""

    def __init__(self, base: nn.Module, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.down, self.up, self.scale = base, down, up, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.down.T @ self.up.T)
