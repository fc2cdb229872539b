"""Torch modules that execute a factorised linear of the IR.

Written for reading, not for speed, and independently of the lowering to ONNX: they are what exported graphs are judged
by. A structure with a module of its own stands in MODULES; every other network is contracted activation first, or
multiplied to its matrix where so many tokens pass that this is less work.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, prod

import torch
from torch import nn

from mixt_export import network
from mixt_export.errors import NetworkError
from mixt_export.network import Branch
from mixt_export.reference.tensor_mixture import MixTLinear, MixTShape

Load = Callable[[str], nn.Parameter]
"""Name of a stored tensor -> its parameter; one object per name, so shared cores are shared parameters."""

LoadIndex = Callable[[str], torch.Tensor]
"""Name of a stored index vector -> int64 tensor."""

_TOKENS = ""
"""Label of the flattened leading axes; labels of the IR are never empty."""


class FactorizedLinear(nn.Module):
    """y = Σ_branches scale · network(x) + sparse · x + bias for x (..., in), y (..., out), in the cores' dtype.

    Raises NetworkError where an index of the sparse residual is outside the matrix.
    """

    def __init__(self, linear: network.FactorizedLinear, load: Load, load_index: LoadIndex) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        names = [tensor.name for tensor in linear.core_tensors()]
        self.cores = nn.ParameterList([load(name) for name in names])
        self._position = {name: position for position, name in enumerate(names)}
        self.bias = None if linear.bias is None else load(linear.bias.name)
        self.values: nn.Parameter | None = None
        if linear.sparse is not None:
            self.values = load(linear.sparse.values.name)
            sides = ("rows", linear.sparse.rows, linear.out_features), ("cols", linear.sparse.cols, linear.in_features)
            for side, ref, bound in sides:
                self.register_buffer(side, _indices(linear, ref.name, bound, load_index), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        flat = x.reshape(-1, self.in_features)
        y = flat.new_zeros(len(flat), self.out_features)
        for branch in self.linear.branches:
            y = y + self._branch(branch, flat)
        if self.values is not None:
            products = flat[:, self.get_buffer("cols")] * self.values
            y = y.index_add(1, self.get_buffer("rows"), products.to(y.dtype))
        if self.bias is not None:
            y = y + self.bias
        out: torch.Tensor = y.reshape(*x.shape[:-1], self.out_features)
        return out

    def _branch(self, branch: Branch, flat: torch.Tensor) -> torch.Tensor:
        tensors = [self.cores[self._position[core.tensor.name]] for core in branch.cores]
        labels = [core.labels for core in branch.cores]
        if _is_low_rank(branch):
            y: torch.Tensor = flat @ tensors[0] @ tensors[1]
        else:
            width = prod(size for _, size in branch.in_modes)
            padded = nn.functional.pad(flat, (0, width - flat.shape[1]))
            y = _apply(branch, padded, tensors, labels)[:, : self.out_features]
        return y if branch.scale == 1.0 else y * branch.scale

    def extra_repr(self) -> str:
        """Features and method, as torch prints modules."""
        return f"in_features={self.in_features}, out_features={self.out_features}, method={self.linear.method!r}"


def _indices(linear: network.FactorizedLinear, name: str, bound: int, load_index: LoadIndex) -> torch.Tensor:
    """Stored indices, none below 0 (which torch would count from the end) and none from ``bound`` on."""
    found = load_index(name)
    outside = found[(found < 0) | (found >= bound)]
    if len(outside):
        raise NetworkError(
            f"Linear {linear.name!r}: expected indices 0..{bound - 1} in {name!r}, found {int(outside[0])}."
        )
    return found


def _mixt(linear: network.FactorizedLinear, load: Load, _load_index: LoadIndex) -> nn.Module | None:
    shape = MixTShape.of(linear)
    if shape is None:
        return None
    bias = None if linear.bias is None else load(linear.bias.name)
    return MixTLinear(shape, [load(tensor.name) for tensor in linear.core_tensors()], bias)


#: Structures with a module of their own: each gives the module, or None when the network is not of that structure.
MODULES: tuple[Callable[[network.FactorizedLinear, Load, LoadIndex], nn.Module | None], ...] = (_mixt,)


def linear_module(linear: network.FactorizedLinear, load: Load, load_index: LoadIndex) -> nn.Module:
    """The module that executes ``linear``: the first of MODULES that knows the structure, or FactorizedLinear."""
    made = (make(linear, load, load_index) for make in MODULES)
    return next((module for module in made if module is not None), None) or FactorizedLinear(linear, load, load_index)


def _is_low_rank(branch: Branch) -> bool:
    """One input mode, one output mode, cores (in, rank) and (rank, out): two matmuls."""
    if len(branch.in_modes) != 1 or len(branch.out_modes) != 1 or len(branch.cores) != 2 or branch.padded:
        return False
    (first, _), (last, _) = branch.in_modes[0], branch.out_modes[0]
    (head, middle), (bond, tail) = (core.labels if len(core.labels) == 2 else ("", "") for core in branch.cores)
    return (head, tail) == (first, last) and middle == bond and middle not in (first, last)


def _apply(
    branch: Branch, flat: torch.Tensor, tensors: list[torch.Tensor], labels: list[tuple[str, ...]]
) -> torch.Tensor:
    """The activation contracted with the cores, or with their matrix where many tokens make that less work."""
    if len(flat) * _work(branch, labels) <= _matrix_work(branch, labels) + len(flat) * branch.in_size * branch.out_size:
        return _contract(branch, flat, tensors, labels)
    state, have = tensors[0], labels[0]
    for index in range(1, len(tensors)):
        keep = _kept(branch, have, labels, index)
        state, have = _einsum(state, have, tensors[index], labels[index], keep), keep
    wanted = [label for label, _ in (*branch.in_modes, *branch.out_modes)]
    matrix = state.permute([have.index(label) for label in wanted]).reshape(branch.in_size, branch.out_size)
    return flat @ matrix


def _kept(branch: Branch, have: tuple[str, ...], labels: list[tuple[str, ...]], index: int) -> tuple[str, ...]:
    """Labels of the product of the cores up to ``index`` that something behind it reads."""
    outer = {label for label, _ in (*branch.in_modes, *branch.out_modes)}
    needed = outer.union(*labels[index + 1 :])
    return tuple(dict.fromkeys(label for label in (*have, *labels[index]) if label in needed))


def _work(branch: Branch, labels: list[tuple[str, ...]]) -> int:
    """Multiply-adds per token of `_contract`."""
    sizes, total = branch.sizes(), 0
    have = [label for label, _ in branch.in_modes]
    outer = {label for label, _ in branch.out_modes}
    waiting = list(range(len(labels)))
    while waiting:
        chosen = next((index for index in waiting if set(labels[index]) & set(have)), waiting[0])
        waiting.remove(chosen)
        joined = tuple(dict.fromkeys((*have, *labels[chosen])))
        total += prod(sizes[label] for label in joined)
        needed = outer.union(*(labels[index] for index in waiting))
        have = [label for label in joined if label in needed]
    return total


def _matrix_work(branch: Branch, labels: list[tuple[str, ...]]) -> float:
    """Multiply-adds of multiplying the cores; infinite where a label of a batch or an identity makes it no matrix."""
    sides = [{label for label, _ in modes} for modes in (branch.in_modes, branch.out_modes)]
    if not labels or sides[0] & sides[1]:
        return inf
    sizes, total, have = branch.sizes(), 0, labels[0]
    for index in range(1, len(labels)):
        total += prod(sizes[label] for label in dict.fromkeys((*have, *labels[index])))
        have = _kept(branch, have, labels, index)
    return total if set(have) == sides[0] | sides[1] else inf


def _contract(
    branch: Branch, flat: torch.Tensor, tensors: list[torch.Tensor], labels: list[tuple[str, ...]]
) -> torch.Tensor:
    """Contract the cores into the activation one by one, each time one that shares a label with it if there is any."""
    state = flat.reshape(len(flat), *(size for _, size in branch.in_modes))
    have: tuple[str, ...] = (_TOKENS, *(label for label, _ in branch.in_modes))
    wanted = (_TOKENS, *(label for label, _ in branch.out_modes))
    waiting = list(range(len(tensors)))
    while waiting:
        chosen = next((index for index in waiting if set(labels[index]) & set(have)), waiting[0])
        waiting.remove(chosen)
        needed = set(wanted).union(*(labels[index] for index in waiting))
        keep = tuple(dict.fromkeys(label for label in (*have, *labels[chosen]) if label in needed))
        state = _einsum(state, have, tensors[chosen], labels[chosen], keep)
        have = keep
    width = prod(size for _, size in branch.out_modes)
    return state.permute(*(have.index(label) for label in wanted)).reshape(len(flat), width)


def _einsum(
    state: torch.Tensor, have: tuple[str, ...], core: torch.Tensor, core_labels: tuple[str, ...], keep: tuple[str, ...]
) -> torch.Tensor:
    number = {label: index for index, label in enumerate(dict.fromkeys((*have, *core_labels)))}
    return torch.einsum(
        state,
        [number[label] for label in have],
        core,
        [number[label] for label in core_labels],
        [number[label] for label in keep],
    )
