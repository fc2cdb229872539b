"""A factorised linear as a model-local ONNX function of the domain ``mixt``: two-operand products only.

The body is the activation-first contraction of ``network``: every MatMul has the running activation as one operand and
one core as the other, so no runtime can multiply two factors back into a dense matrix. Cores are read as stored; a
Transpose or Reshape of a core is of a constant and folds away, a Transpose of the activation is counted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import onnx
from onnx import helper

from mixt_export.errors import UnsupportedError
from mixt_export.network import Branch, Core, FactorizedLinear, Order, best_orders, einsum, macs
from mixt_export.network.matmuls import BATCH, SEQ, Axes, Step, schedule

DOMAIN = "mixt"
_OPSET = 23

_Groups = tuple[Axes, ...]
"""Which labels each axis of a value holds, row-major."""


@dataclass(frozen=True, slots=True)
class NetworkFunction:
    """A function and how to call it: ``y = proto(x, *tensors)`` with x (batch, seq, in), y (batch, seq, out).

    ``tensors`` are the names of the checkpoint's tensors to pass after x: each distinct core once, then the bias. All
    must have the dtype of x. ``transposes`` counts permutations of the activation, ``macs`` is multiply-adds per token.
    """

    proto: onnx.FunctionProto
    tensors: tuple[str, ...]
    transposes: int
    macs: int


def function_for(linear: FactorizedLinear, opset: int = _OPSET) -> NetworkFunction:
    """The function that computes ``linear``, named ``<Method>Linear_<8 hex digits of its body>``.

    Linears with the same body (low rank: of any sizes) get the same name and the same text. ``opset`` (18 or later) is
    the version of the standard domain the body is written in. Raises UnsupportedError for a sparse residual,
    NetworkError when no contraction order fits (see ``network.best_order``).
    """
    if linear.sparse is not None:
        raise UnsupportedError(
            f"Linear {linear.name!r} has a sparse residual, which ONNX export cannot express without a dense matrix; "
            "compress without the residual, or fold it into a dense weight."
        )
    body = _Body(linear)
    orders = best_orders(linear)
    total = body.sum([body.branch(index, order) for index, order in enumerate(orders)])
    if linear.bias is not None:
        total = body.emit("Add", [total, "bias"], "biased")
    body.finish(total)
    cores = linear.core_tensors()
    inputs = ["x", *(f"core{index}" for index in range(len(cores)))]
    tensors = [core.name for core in cores]
    if linear.bias is not None:
        inputs.append("bias")
        tensors.append(linear.bias.name)
    proto = helper.make_function(DOMAIN, "", inputs, ["y"], body.nodes, [helper.make_opsetid("", opset)])
    proto.doc_string = "y = " + " + ".join(dict.fromkeys(einsum(branch) for branch in linear.branches))
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()[:8]
    proto.name = f"{_camel(linear.method)}Linear_{digest}"
    return NetworkFunction(proto, tuple(tensors), body.transposes, macs(linear, orders))


class _Body:
    """Nodes of one function body, emitted in order. Value and node names follow the branch, the step and the op."""

    def __init__(self, linear: FactorizedLinear) -> None:
        self._linear = linear
        self._operands = {tensor.name: f"core{index}" for index, tensor in enumerate(linear.core_tensors())}
        self._constants: dict[tuple[int, ...], str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.transposes = 0

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

    def branch(self, index: int, order: Order) -> str:
        """Emit the branch ``index``: y (batch, seq, ∏ out_modes), unscaled."""
        branch = self._linear.branches[index]
        stem = f"branch{index}_" if len(self._linear.branches) > 1 else ""
        return _Walk(self, branch, order, stem, self._padded(branch.in_size)).result()

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
        if value == "x":
            self.emit("Identity", ["x"], "y")
        else:
            node = next(node for node in self.nodes if node.output[0] == value)
            node.output[0] = "y"
            node.name = f"y/{node.op_type}"

    def operand(self, core: Core) -> str:
        """Name of the function input that holds ``core``."""
        return self._operands[core.tensor.name]

    def _padded(self, size: int) -> str:
        """X with zeros at the end up to ``size`` features, once per size."""
        padding = size - self._linear.in_features
        if padding == 0:
            return "x"
        output = f"x_padded_{size}"
        if not any(output in node.output for node in self.nodes):
            self.emit("Pad", ["x", self.integers([0, 0, 0, 0, 0, padding])], output)
        return output

    def _finished(self, value: str, branch: Branch, stem: str) -> str:
        """``value`` cropped to the linear's features and scaled, in its own dtype; no node where nothing changes."""
        if branch.out_size > self._linear.out_features:
            bounds = [self.integers([bound]) for bound in (0, self._linear.out_features, 2)]
            value = self.emit("Slice", [value, *bounds], f"{stem}cropped")
        if branch.scale == 1.0:
            return value
        constant = self.emit("Constant", [], f"{stem}scale_f32", value_float=branch.scale)
        factor = self.emit("CastLike", [constant, value], f"{stem}scale")
        return self.emit("Mul", [value, factor], f"{stem}scaled")


class _Walk:
    """Carries the activation of one branch through its steps, knowing which labels each of its axes holds."""

    def __init__(self, body: _Body, branch: Branch, order: Order, stem: str, value: str) -> None:
        self._body, self._branch, self._stem, self._value = body, branch, stem, value
        self._sizes = branch.sizes()
        self._schedule = schedule(branch, order)
        source = self._schedule.source
        self._groups: _Groups = ((BATCH,), (SEQ,), source[2:])

    def result(self) -> str:
        """Emit every step; the activation ends as (batch, seq, ∏ out_modes)."""
        for number, step in enumerate(self._schedule.steps):
            self._arrange(step.arranged, f"{self._stem}step{number}")
            _FORMS[step.form](self, step, f"{self._stem}step{number}")
        self._arrange(self._schedule.target, f"{self._stem}out")
        self._regroup(((BATCH,), (SEQ,), self._schedule.target[2:]), f"{self._stem}out")
        return self._value

    def _arrange(self, wanted: Axes, name: str) -> None:
        """Permute the activation's labels into ``wanted``, moving neighbours that stay together as one axis."""
        current = tuple(label for group in self._groups for label in group)
        if current == wanted:
            return
        blocks = _blocks(current, wanted)
        self._regroup(blocks, f"{name}_split")
        order = sorted(range(len(blocks)), key=lambda axis: wanted.index(blocks[axis][0]))
        self._value = self._body.emit("Transpose", [self._value], f"{name}_moved", perm=order)
        self._groups = tuple(blocks[axis] for axis in order)
        self._body.transposes += 1

    def _right(self, step: Step, name: str) -> None:
        labels = tuple(label for group in self._groups for label in group)
        rest = labels[1 + len(step.batch) : len(labels) - len(step.summed)]
        if step.batch:
            self._regroup(((BATCH,), step.batch, rest, step.summed), name)
        elif self._groups[-1] != step.summed:
            self._regroup(((BATCH,), *_apart(rest), step.summed), name)
        shape = (step.batch, step.summed, step.new) if step.batch else (step.summed, step.new)
        core = self._core(step.core, shape, name)
        self._value = self._body.emit("MatMul", [self._value, core], f"{name}_y")
        self._groups = (*self._groups[:-1], step.new)

    def _left(self, step: Step, name: str) -> None:
        labels = tuple(label for group in self._groups for label in group)
        start = labels.index(step.summed[0])
        before, after = labels[1:start], labels[start + len(step.summed) :]
        self._regroup(((BATCH,), *_apart(before), step.summed, after), name)
        core = self._core(step.core, (step.new, step.summed), name)
        self._value = self._body.emit("MatMul", [core, self._value], f"{name}_y")
        self._groups = ((BATCH,), *_apart(before), step.new, after)

    def _scale(self, step: Step, name: str) -> None:
        labels = tuple(label for group in self._groups for label in group)
        self._regroup(((BATCH,), *_apart(labels[1 : len(labels) - len(step.batch)]), step.batch), name)
        core = self._core(step.core, (step.batch,), name)
        self._value = self._body.emit("Mul", [self._value, core], f"{name}_y")

    def _regroup(self, groups: _Groups, name: str) -> None:
        """Reshape the activation so that its axes hold ``groups``; no node when the shape stays."""
        if self._shape(groups) != self._shape(self._groups):
            keeps_seq = groups[1] == (SEQ,) == self._groups[1]
            shape = [0, 0 if keeps_seq else self._dim(groups[1]), *(self._dim(group) for group in groups[2:])]
            self._value = self._body.emit("Reshape", [self._value, self._body.integers(shape)], f"{name}_grouped")
        self._groups = groups

    def _core(self, index: int, groups: _Groups, name: str) -> str:
        """The core as a matrix (or a stack of them) whose axes hold ``groups``; permutes and reshapes the constant."""
        core = self._branch.cores[index]
        value = self._body.operand(core)
        wanted = [label for group in groups for label in group]
        ones = [label for label, size in core.modes() if size == 1]
        stored = [label for label in core.labels if label not in ones]
        shape = list(core.tensor.shape)
        if stored != wanted:
            perm = [core.labels.index(label) for label in (*ones, *wanted)]
            value = self._body.emit("Transpose", [value], f"{name}_core_moved", perm=perm)
            shape = [shape[axis] for axis in perm]
        matrix = [prod(self._sizes[label] for label in group) for group in groups]
        if shape != matrix:
            value = self._body.emit("Reshape", [value, self._body.integers(matrix)], f"{name}_core_grouped")
        return value

    def _dim(self, group: Axes) -> int:
        return -1 if SEQ in group else prod(self._sizes[label] for label in group)

    def _shape(self, groups: _Groups) -> list[tuple[bool, bool, int]]:
        """Per axis: does it hold the batch, does it hold the positions, and the product of its labels' sizes."""
        return [(BATCH in group, SEQ in group, prod(self._sizes.get(label, 1) for label in group)) for group in groups]


_FORMS = {"right": _Walk._right, "left": _Walk._left, "scale": _Walk._scale}


def _blocks(current: Axes, wanted: Axes) -> _Groups:
    """Longest runs of labels that are neighbours in both orders."""
    blocks: list[Axes] = []
    for label in current:
        position = wanted.index(label)
        joins = blocks and position > 0 and wanted[position - 1] == blocks[-1][-1] and label not in (BATCH, SEQ)
        if joins and blocks[-1][-1] not in (BATCH, SEQ):
            blocks[-1] = (*blocks[-1], label)
        else:
            blocks.append((label,))
    return tuple(blocks)


def _apart(labels: Axes) -> _Groups:
    """One axis, with the positions on an axis of their own where they come first: a Reshape then keeps their size."""
    if labels[:1] != (SEQ,):
        return (labels,)
    return ((SEQ,), labels[1:]) if labels[1:] else ((SEQ,),)


def _camel(method: str) -> str:
    words = re.split(r"[^A-Za-z0-9]+", method)
    return "".join(word[:1].upper() + word[1:] for word in words) or "Network"
