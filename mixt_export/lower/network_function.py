"""A factorised linear as a model-local ONNX function of the domain ``mixt``: two-operand products only.

The body is the activation-first contraction of ``network``: every MatMul has the running activation as one operand and
one core as the other, so no runtime can multiply two factors back into a dense matrix. Every core comes as the matrix
its product reads (an `Operand`), so that the body permutes and reshapes activations only; their Transposes are counted.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import onnx
from onnx import helper

from mixt_export.errors import UnsupportedError
from mixt_export.network import Branch, Core, FactorizedLinear, Order, best_orders, einsum, macs
from mixt_export.network.matmuls import LEFT_SUFFIX
from mixt_export.network.order import steps
from mixt_export.network.program import Groups, Instruction, Product, Reshape, Transpose, program

DOMAIN = "mixt"
_OPSET = 23


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor as a function reads it: axes permuted by ``perm``, then reshaped to ``shape``."""

    tensor: str
    perm: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def stored(self) -> bool:
        """Whether its elements lie in the order in which the tensor is stored."""
        return self.perm == tuple(range(len(self.perm)))


@dataclass(frozen=True, slots=True)
class NetworkFunction:
    """A function and how to call it: ``y = proto(x, *operands)`` with x (batch, seq, in), y (batch, seq, out).

    ``operands`` are what to pass after x: each core in each layout that some product reads, then the bias. All must
    have the dtype of x. ``transposes`` counts permutations of the activation, ``macs`` is multiply-adds per token.
    """

    proto: onnx.FunctionProto
    operands: tuple[Operand, ...]
    transposes: int
    macs: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors of the operands."""
        return tuple(operand.tensor for operand in self.operands)


def function_for(
    linear: FactorizedLinear,
    opset: int = _OPSET,
    *,
    orders: Sequence[Order] | None = None,
    left_from: int = LEFT_SUFFIX,
    flat: bool = False,
    einsum_nodes: bool = False,
) -> NetworkFunction:
    """The function that computes ``linear``, named ``<Method>Linear_<8 hex digits of its body>``.

    Linears with the same body (low rank: of any sizes) get the same name and the same text. ``opset`` (18 or later) is
    the version of the standard domain the body is written in; ``orders``: one per branch, by default the best;
    ``left_from``: see `network.matmuls.schedule`. A ``flat`` body that permutes axes folds batch and positions into one
    first: TensorRT-RTX fails on permuted axes with one of size 1 among them. With ``einsum_nodes`` every step is one
    Einsum of the activation's modes and a core as it is stored, for reading: the same steps, executed more slowly.
    Raises UnsupportedError for a sparse residual, NetworkError when no contraction order fits (see `best_order`).
    """
    if linear.sparse is not None:
        raise UnsupportedError(f"Linear {linear.name!r} has a sparse residual, which is no part of a network function.")
    chosen = best_orders(linear) if orders is None else tuple(orders)
    pairs = list(zip(linear.branches, chosen, strict=True))
    programs = [program(branch, order, left_from) for branch, order in pairs]
    flat = flat and not einsum_nodes and any(isinstance(step, Transpose) for steps_ in programs for step in steps_)
    if flat:
        programs = [program(branch, order, left_from, flat=True) for branch, order in pairs]
    body = _Body(linear, flat)
    results = []
    for index, (branch, order) in enumerate(pairs):
        stem = f"branch{index}_" if len(pairs) > 1 else ""
        if einsum_nodes:
            results.append(body.einsums(branch, order, stem))
        else:
            results.append(body.branch(branch, programs[index], stem))
    total = body.sum(results)
    if linear.bias is not None:
        total = body.emit("Add", [total, body.bias(linear.bias.name, linear.bias.shape)], "biased")
    body.finish(total)
    inputs = ["x", *body.names()]
    proto = helper.make_function(DOMAIN, "", inputs, ["y"], body.nodes, [helper.make_opsetid("", opset)])
    proto.doc_string = "y = " + " + ".join(dict.fromkeys(einsum(branch) for branch in linear.branches))
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()[:8]
    proto.name = f"{_camel(linear.method)}{'Einsum' if einsum_nodes else 'Linear'}_{digest}"
    return NetworkFunction(proto, body.operands(), body.transposes, macs(linear, chosen))


class _Body:
    """Nodes of one function body, emitted in order. Value and node names follow the branch, the step and the op."""

    def __init__(self, linear: FactorizedLinear, flat: bool) -> None:
        self._linear, self._flat = linear, flat
        self._operands: dict[Operand, str] = {}
        self._constants: dict[tuple[int, ...], str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.transposes = 0
        self._x = "x"
        if flat:
            self._x = self.emit("Reshape", ["x", self.integers([-1, linear.in_features])], "x_flat")

    def names(self) -> list[str]:
        """Inputs of the function behind x."""
        return list(self._operands.values())

    def operands(self) -> tuple[Operand, ...]:
        """What to pass for them."""
        return tuple(self._operands)

    def emit(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node and return its output's name."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attributes))
        return output

    def integers(self, values: Sequence[int]) -> str:
        """A constant int64 vector; equal ones are one node."""
        key = tuple(values)
        if key not in self._constants:
            name = "ints_" + "_".join(str(value).replace("-", "m") for value in key)
            self._constants[key] = self.emit("Constant", [], name, value_ints=list(key))
        return self._constants[key]

    def branch(self, branch: Branch, instructions: Sequence[Instruction], stem: str) -> str:
        """Emit ``branch``: y (batch, seq, ∏ out_modes), unscaled."""
        matrices = {
            instruction.core: matrix_of(branch.cores[instruction.core], instruction.layout)
            for instruction in instructions
            if isinstance(instruction, Product)
        }
        operands = {index: self._operand(matrices[index]) for index in sorted(matrices)}
        value = self._padded(branch.in_size)
        for instruction in instructions:
            value = _EMIT[type(instruction)](self, instruction, value, stem, operands)
        return value

    def einsums(self, branch: Branch, order: Order, stem: str) -> str:
        """The same with one Einsum for each core of ``order``."""
        letter = dict(zip(branch.sizes(), string.ascii_letters, strict=False))
        batch, seq = (letter_ for letter_ in string.ascii_letters[len(letter) : len(letter) + 2])
        operands = [
            self._operand(Operand(core.tensor.name, tuple(range(len(core.labels))), core.tensor.shape))
            for core in branch.cores
        ]
        axes = [label for label, _ in branch.in_modes]
        shape = self.integers([0, 0, *(size for _, size in branch.in_modes)])
        value = self.emit("Reshape", [self._padded(branch.in_size), shape], f"{stem}modes")
        walk = list(zip(order, steps(branch, order), strict=True))
        for number, (index, (_, after)) in enumerate(walk):
            kept = after if number + 1 < len(walk) else [label for label, _ in branch.out_modes]
            source, core, target = (
                "".join(letter[label] for label in group) for group in (axes, branch.cores[index].labels, kept)
            )
            equation = f"{batch}{seq}{source},{core}->{batch}{seq}{target}"
            value = self.emit("Einsum", [value, operands[index]], f"{stem}step{number}_y", equation=equation)
            axes = list(kept)
        return self.emit("Reshape", [value, self.integers([0, 0, branch.out_size])], f"{stem}out_grouped")

    def bias(self, name: str, shape: tuple[int, ...]) -> str:
        """The function input that holds the bias."""
        self._operands[Operand(name, (0,), shape)] = "bias"
        return "bias"

    def sum(self, values: Sequence[str]) -> str:
        """Crop, scale and add the branches: what they have in common is done once, after the sum."""
        branches = self._linear.branches
        alike = len({(branch.scale, branch.out_size) for branch in branches}) == 1
        if not alike:
            values = [
                self._finished(value, branch, f"branch{index}_")
                for index, (value, branch) in enumerate(zip(values, branches, strict=True))
            ]
        total = values[0]
        for index, value in enumerate(values[1:], 1):
            total = self.emit("Add", [total, value], f"sum{index}")
        return self._finished(total, branches[0], "") if alike else total

    def finish(self, value: str) -> None:
        """Make ``value`` the output ``y``."""
        if self._flat:
            sizes = self.emit("Gather", [self.emit("Shape", ["x"], "x_shape"), self.integers([0, 1])], "leading")
            shape = [sizes, self.integers([self._linear.out_features])]
            value = self.emit("Reshape", [value, self.emit("Concat", shape, "y_shape", axis=0)], "whole")
        if value == "x":
            self.emit("Identity", ["x"], "y")
        else:
            node = next(node for node in self.nodes if node.output[0] == value)
            node.output[0] = "y"
            node.name = f"y/{node.op_type}"

    def reshape(self, instruction: Reshape, value: str, stem: str, _operands: dict[int, str]) -> str:
        """Emit a Reshape of the activation."""
        return self.emit("Reshape", [value, self.integers(instruction.shape)], f"{stem}{instruction.name}")

    def transpose(self, instruction: Transpose, value: str, stem: str, _operands: dict[int, str]) -> str:
        """Emit a Transpose of the activation."""
        self.transposes += 1
        return self.emit("Transpose", [value], f"{stem}{instruction.name}", perm=list(instruction.perm))

    def product(self, instruction: Product, value: str, stem: str, operands: dict[int, str]) -> str:
        """Emit a product of the activation with a core."""
        core = operands[instruction.core]
        inputs = [core, value] if instruction.form == "left" else [value, core]
        op = "Mul" if instruction.form == "scale" else "MatMul"
        return self.emit(op, inputs, f"{stem}{instruction.name}")

    def _operand(self, operand: Operand) -> str:
        return self._operands.setdefault(operand, f"core{len(self._operands)}")

    def _padded(self, size: int) -> str:
        """X with zeros at the end up to ``size`` features, once per size."""
        padding = size - self._linear.in_features
        if padding == 0:
            return self._x
        output = f"x_padded_{size}"
        if not any(output in node.output for node in self.nodes):
            pads = [0] * (3 if self._flat else 5) + [padding]
            self.emit("Pad", [self._x, self.integers(pads)], output)
        return output

    def _finished(self, value: str, branch: Branch, stem: str) -> str:
        """``value`` cropped to the linear's features and scaled, in its own dtype; no node where nothing changes."""
        if branch.out_size > self._linear.out_features:
            bounds = [self.integers([bound]) for bound in (0, self._linear.out_features, 1 if self._flat else 2)]
            value = self.emit("Slice", [value, *bounds], f"{stem}cropped")
        if branch.scale == 1.0:
            return value
        constant = self.emit("Constant", [], f"{stem}scale_f32", value_float=branch.scale)
        factor = self.emit("CastLike", [constant, value], f"{stem}scale")
        return self.emit("Mul", [value, factor], f"{stem}scaled")


_Emit = Callable[[_Body, Any, str, str, dict[int, str]], str]
_EMIT: dict[type[Instruction], _Emit] = {Reshape: _Body.reshape, Transpose: _Body.transpose, Product: _Body.product}


def matrix_of(core: Core, layout: Groups) -> Operand:
    """``core`` as the tensor whose axes hold the groups of labels ``layout``; axes of size 1 belong to none."""
    sizes = dict(core.modes())
    ones = [axis for axis, label in enumerate(core.labels) if sizes[label] == 1]
    wanted = [core.labels.index(label) for group in layout for label in group]
    shape = tuple(prod(sizes[label] for label in group) for group in layout)
    if sorted(wanted) == wanted:
        return Operand(core.tensor.name, tuple(range(len(core.labels))), shape)
    return Operand(core.tensor.name, (*ones, *wanted), shape)


def _camel(method: str) -> str:
    words = re.split(r"[^A-Za-z0-9]+", method)
    return "".join(word[:1].upper() + word[1:] for word in words) or "Network"
