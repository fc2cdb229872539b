"""PyTorch with activations rounded as the products of the graph round them.

MatMulNBits at accuracy level 4 in blocks, DynamicQuantizeMatMul with one scale for all that one call is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mixt_export.network import Branch
from mixt_export.quantisation.blocks import dequantised
from mixt_export.verification.context import Context
from mixt_export.verification.int8_cache import float_cache
from mixt_export.verification.metrics import relative_l2
from mixt_export.verification.quantised import INTEGER, Matrix, ends_of
from mixt_export.verification.session import ExportedRunner
from mixt_export.verification.torch_model import TorchModel

#: Tokens on which single products are compared.
_TOKENS = 16


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


def rounded_call(x: Any) -> Any:
    """``x`` rounded to 255 steps from its least to its largest number, or 0, half to even; 0 stays 0.

    Operator DynamicQuantizeLinear of the ONNX standard, which DynamicQuantizeMatMul applies to what it reads.
    """
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    if not scale > 0:
        return x
    zero = (-low / scale).clamp(0, 255).round()
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def rounded_input(x: Any, matrix: Matrix, sizes: Sequence[int]) -> Any:
    """``x`` (1, positions, K), ``sizes`` of them in each call, rounded as the product by ``matrix`` does.

    With a scale for each "token", its largest magnitude is what it is divided by while that happens.
    """
    import torch

    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) if matrix.activations == "token" else 1.0
    return torch.cat([rounded_call(part) for part in (x / largest).split(list(sizes), dim=1)], dim=1) * largest


def rounded_apart(x: Any, matrix: Matrix, sizes: Sequence[int]) -> Any:
    """The same where the channels of ``x`` are not yet divided by the matrix's ``inputs``."""
    import torch

    factors = 1.0 if matrix.inputs is None else torch.from_numpy(matrix.inputs).to(x.dtype)
    return rounded_input(x / factors, matrix, sizes) * factors


def products_apart(context: Context) -> tuple[float, str]:
    """The integer product that is furthest, and how far, from float64 on the very numbers that the graph gives it.

    Relative L2 over a few tokens, of its integers by what it reads, rounded. In a deep model flips of single codes
    drown what rounding costs as a whole; here there are none before the product. Codes are found in float32, as the
    operator does: the end of a range may lie halfway between two.
    """
    import torch

    matrices = {matrix.codes.name: matrix for matrix in context.matrices.values()}
    nodes = context.graph.proto.graph.node
    ends: dict[str, tuple[str, str]] = {}
    for node in nodes:
        if node.op_type == INTEGER:
            if node.input[1] not in matrices:
                return math.inf, node.name
            ends[node.input[1]] = ends_of(node, matrices[node.input[1]], nodes)
    values = list(dict.fromkeys(name for pair in ends.values() for name in pair))
    if not values:
        return 0.0, ""
    graph, threads = float_cache(context.graph), context.options.threads
    tokens = context.probe[:_TOKENS]
    step = ExportedRunner(graph, threads, all_positions=True, values=values).full(tokens)
    found = dict(zip(values, step.layers, strict=True))
    worst = (0.0, "")
    for codes, (source, result) in ends.items():
        matrix = matrices[codes]
        read = rounded_input(torch.from_numpy(found[source]), matrix, [len(tokens)]).numpy()
        expected = read[0].astype(np.float64) @ dequantised(matrix.blocks()).astype(np.float64).T
        worst = max(worst, (relative_l2(found[result][0], expected), matrix.linear))
    return worst


@contextmanager
def rounding_activations(model: TorchModel, matrices: Mapping[str, Matrix], sizes: Sequence[int]) -> Iterator[None]:
    """While open, every linear of ``model`` that has quantised matrices rounds what each of them reads.

    Of a chain of matrices (low rank, Tucker-2) every product does; any other factorised linear rounds its input.
    ``sizes``: how many of the positions that the model is given go into each call of the graph.
    """
    import torch

    own = {part: matrix for matrix in matrices.values() for part in _weights(matrix)}
    groups = {part: matrix.group for part, matrix in own.items() if not matrix.activations}
    hooks: list[Any] = []
    replaced: list[Any] = []
    tied = {id(model.model.get_parameter(name)): own[name] for name in groups if _has(model.model, name)}
    for name, module in model.model.named_modules():
        linear = getattr(module, "linear", None)
        weight = getattr(module, "weight", None)
        if linear is not None and hasattr(module, "cores"):
            if any(tensor.name in own for tensor in linear.core_tensors()):
                replaced.append(module)
                module._branch = _rounding_branch(module, own, sizes)
        elif weight is not None and weight.dim() == 2 and not isinstance(module, torch.nn.Embedding):
            matrix = own.get(f"{name}.weight") or tied.get(id(weight))
            if matrix is not None:
                hooks.append(module.register_forward_pre_hook(_hook(matrix, sizes)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in replaced:
            del module._branch


def _weights(matrix: Matrix) -> tuple[str, ...]:
    return matrix.parts or (f"{matrix.linear}.weight",)


def _has(model: Any, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def _rounded(x: Any, matrix: Matrix, sizes: Sequence[int]) -> Any:
    """``x`` (1, positions, K) or (positions, K) as the product by ``matrix`` rounds it."""
    if not matrix.activations:
        return rounded_blocks(x, matrix.group)
    return rounded_apart(x.reshape(1, -1, x.shape[-1]), matrix, sizes).reshape(x.shape)


def _hook(matrix: Matrix, sizes: Sequence[int]) -> Any:
    return lambda _module, inputs: (_rounded(inputs[0], matrix, sizes), *inputs[1:])


def _rounding_branch(module: Any, own: Mapping[str, Matrix], positions: Sequence[int]) -> Any:
    """`_branch` of a FactorizedLinear that rounds what each matrix of ``own`` is multiplied with, as its product does.

    ``positions``: how many go into each call.
    """
    plain = module._branch
    cores = {tensor.name: core for tensor, core in zip(module.linear.core_tensors(), module.cores, strict=True)}

    def branch_of(branch: Branch, flat: Any) -> Any:
        known = [own.get(core.tensor.name) for core in branch.cores]
        steps = _chain(branch)
        if steps is None:
            sizes = [matrix.group for matrix in known if matrix is not None]
            return plain(branch, rounded_blocks(flat, max(sizes)) if sizes else flat)
        for index, turned in steps:
            core, matrix = cores[branch.cores[index].tensor.name], known[index]
            given = flat if matrix is None else _rounded(flat, matrix, positions)
            flat = given @ (core.T if turned else core)
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
