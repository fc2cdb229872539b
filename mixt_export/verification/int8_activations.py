"""PyTorch with activations rounded as MatMulNBits rounds them at accuracy level 4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mixt_export.network import Branch
from mixt_export.verification.quantised import Matrix
from mixt_export.verification.torch_model import TorchModel


def rounded_blocks(x: Any, group: int) -> Any:
    """``x`` (..., K) with each block of ``group`` rounded to multiples of its largest magnitude / 127, half to even.

    The kernel of ONNX Runtime's CPU (MLAS, QuantizeARow of its block quantised products) does this to what it reads.
    """
    import torch

    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % group))
    blocks = padded.reshape(*padded.shape[:-1], -1, group)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    scale = largest / 127
    inverse = torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))
    return ((blocks * inverse).round() * scale).reshape(padded.shape)[..., :columns]


@contextmanager
def rounding_activations(model: TorchModel, matrices: Mapping[str, Matrix]) -> Iterator[None]:
    """While open, every linear of ``model`` that has quantised matrices rounds what each of them reads.

    Of a chain of matrices (low rank, Tucker-2) every product does; any other factorised linear rounds its input.
    """
    import torch

    groups = {part: matrix.group for matrix in matrices.values() for part in matrix.parts}
    groups |= {f"{matrix.linear}.weight": matrix.group for matrix in matrices.values() if not matrix.parts}
    hooks: list[Any] = []
    replaced: list[Any] = []
    tied = {id(model.model.get_parameter(name)): group for name, group in groups.items() if _has(model.model, name)}
    for name, module in model.model.named_modules():
        linear = getattr(module, "linear", None)
        weight = getattr(module, "weight", None)
        if linear is not None and hasattr(module, "cores"):
            if any(tensor.name in groups for tensor in linear.core_tensors()):
                replaced.append(module)
                module._branch = _rounding_branch(module, groups)
        elif weight is not None and weight.dim() == 2 and not isinstance(module, torch.nn.Embedding):
            group = groups.get(f"{name}.weight") or tied.get(id(weight), 0)
            if group:
                hooks.append(module.register_forward_pre_hook(_hook(group)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in replaced:
            del module._branch


def _has(model: Any, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def _hook(group: int) -> Any:
    return lambda _module, inputs: (rounded_blocks(inputs[0], group), *inputs[1:])


def _rounding_branch(module: Any, groups: Mapping[str, int]) -> Any:
    """`_branch` of a FactorizedLinear that rounds, in its blocks, what each matrix of ``groups`` is multiplied with."""
    plain = module._branch
    cores = {tensor.name: core for tensor, core in zip(module.linear.core_tensors(), module.cores, strict=True)}

    def branch_of(branch: Branch, flat: Any) -> Any:
        sizes = [groups.get(core.tensor.name, 0) for core in branch.cores]
        steps = _chain(branch)
        if steps is None:
            return plain(branch, rounded_blocks(flat, max(sizes)) if any(sizes) else flat)
        for index, turned in steps:
            matrix = cores[branch.cores[index].tensor.name]
            given = rounded_blocks(flat, sizes[index]) if sizes[index] else flat
            flat = given @ (matrix.T if turned else matrix)
        return flat * branch.scale

    return branch_of


def _chain(branch: Branch) -> list[tuple[int, bool]] | None:
    """Matrices from the input to the output one after the other: which core, and whether it is (out, in).

    None where ``branch`` is anything else.
    """
    if len(branch.in_modes) != 1 or len(branch.out_modes) != 1 or branch.padded:
        return None
    label, left, steps = branch.in_modes[0][0], set(range(len(branch.cores))), []
    while left:
        found = [index for index in left if label in branch.cores[index].labels]
        if len(found) != 1 or len(branch.cores[found[0]].labels) != 2:
            return None
        first, second = branch.cores[found[0]].labels
        steps.append((found[0], second == label))
        label = first if second == label else second
        left.remove(found[0])
    return steps if label == branch.out_modes[0][0] else None
