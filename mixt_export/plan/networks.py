"""Executable forms of a linear of any structure: its cores merged more or less, in some order, or the plain matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod

from mixt_export.errors import NetworkError
from mixt_export.network import Branch, FactorizedLinear, best_order
from mixt_export.network.matmuls import LEFT_SUFFIX
from mixt_export.network.program import Instruction, Product, Transpose, program
from mixt_export.plan.groups import Group, Groups, candidates, multiply_adds, name_of
from mixt_export.plan.merged import merge
from mixt_export.plan.operations import Operation, macs, transposes

NAIVE = 8
"""A form with more than this many times the multiply-adds of the dense matrix is executed only where nothing else fits
into the memory."""

_FORMS = 16
"""Forms of one linear at most, besides the stored cores and the matrix."""

_NARROW = 4
"""Columns of the narrower left products that are tried as well."""


@dataclass(frozen=True, slots=True)
class Read:
    """A weight as a product reads it: the merged cores ``group`` of branch ``branch``, axes permuted by ``perm``."""

    branch: int
    group: Group
    perm: tuple[int, ...]
    elements: int

    @property
    def stored(self) -> bool:
        """Whether it is a stored tensor, as it is stored."""
        return len(self.group) == 1 and list(self.perm) == sorted(self.perm)


@dataclass(frozen=True, slots=True)
class NetworkForm:
    """One way to execute a linear. Everything here follows from shapes, so that linears of one structure share forms.

    ``groups``: per branch the cores merged ahead of time, in the order of execution; empty for the plain matrix.
    ``reads``: each weight in each layout once, none for the plain matrix. ``elements``: numbers of weights the graph
    holds, bias not counted. ``left_from``: see `network.matmuls.schedule`.
    """

    name: str
    in_features: int
    out_features: int
    groups: tuple[Groups, ...]
    reads: tuple[Read, ...]
    elements: int
    operations: tuple[Operation, ...]
    bias: bool = False
    left_from: int = LEFT_SUFFIX

    @property
    def dense(self) -> bool:
        """Whether it is the plain matrix."""
        return not self.groups

    @property
    def merges(self) -> bool:
        """Whether it holds something that is not stored."""
        return self.dense or any(len(group) > 1 for groups in self.groups for group in groups)

    def nbytes(self, itemsize: int = 4) -> int:
        """Bytes of weights the graph holds, with ``itemsize`` bytes a number, bias not counted."""
        return itemsize * self.elements

    @property
    def macs(self) -> int:
        """Multiply-adds per token; adding branches and bias is not counted."""
        return macs(self.operations)

    @property
    def transposes(self) -> int:
        """How often an activation is permuted."""
        return transposes(self.operations)

    @property
    def nodes(self) -> int:
        """Operators executed."""
        return len(self.operations)


def network_forms(linear: FactorizedLinear) -> tuple[NetworkForm, ...]:
    """Forms of ``linear``: the stored cores in their best order first, the matrix last.

    A linear of several branches merges each of them alike where they are built alike, else each in the way that is
    smallest, or quickest. Raises NetworkError as ``network.best_order``.
    """
    dense = _dense(linear)
    ways = _ways(linear, dense.elements)
    stored, *others = _possible(linear, ways)
    narrow = [
        form
        for form in (network_form(linear, other.groups, _NARROW) for other in (stored, *others) if other.transposes)
        if form.left_from != LEFT_SUFFIX
    ]
    kept = _pruned([*others, *narrow], stored, dense)
    return (stored, *kept, dense)


def _possible(linear: FactorizedLinear, ways: Sequence[tuple[Groups, ...]]) -> Iterator[NetworkForm]:
    """Forms of ``ways``, the first whatever it is; a merged core may have more axes than a core can have."""
    yield network_form(linear, ways[0])
    for groups in ways[1:]:
        with suppress(NetworkError):
            yield network_form(linear, groups)


def network_form(linear: FactorizedLinear, groups: tuple[Groups, ...], left_from: int = LEFT_SUFFIX) -> NetworkForm:
    """The form that executes ``groups``; one with ``left_from`` is the same as one without where nothing is narrow."""
    network = merge(linear, groups).network
    programs = [program(branch, tuple(range(len(branch.cores))), left_from) for branch in network.branches]
    name = "/".join(dict.fromkeys(map(name_of, groups)))
    if left_from != LEFT_SUFFIX:
        usual = [program(branch, tuple(range(len(branch.cores)))) for branch in network.branches]
        if usual == programs:
            left_from = LEFT_SUFFIX
        else:
            name += ":left"
    reads: dict[object, Read] = {}
    for number, (branch, instructions) in enumerate(zip(network.branches, programs, strict=True)):
        for step in instructions:
            if isinstance(step, Product):
                core = branch.cores[step.core]
                perm = tuple(core.labels.index(label) for axis in step.layout for label in axis)
                reads.setdefault(
                    (core.tensor.name, perm), Read(number, groups[number][step.core], perm, core.tensor.size)
                )
    elements = sum(read.elements for read in reads.values()) + (linear.sparse.nnz if linear.sparse else 0)
    operations = tuple(_operations(network, programs))
    features = (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    return NetworkForm(name, *features, groups, tuple(reads.values()), elements, operations, bias, left_from)


def _dense(linear: FactorizedLinear) -> NetworkForm:
    rows, columns = linear.in_features, linear.out_features
    product = Operation("right", 1, 1, rows, columns, rows * columns)
    bias = linear.bias is not None
    operations = (product, Operation("elementwise", moved=2 * columns)) if bias else (product,)
    return NetworkForm("dense", rows, columns, (), (), rows * columns, operations, bias)


def _ways(linear: FactorizedLinear, limit: int) -> list[tuple[Groups, ...]]:
    """Groups of all branches, the stored cores in their best order first."""
    best: tuple[Groups, ...] = tuple(tuple((index,) for index in best_order(branch)) for branch in linear.branches)
    options = [candidates(branch, limit) for branch in linear.branches]
    found = [best]
    if len({tuple(option) for option in options}) == 1:
        found += [(groups,) * len(options) for groups in options[0]]
    else:
        smallest = tuple(option[0] for option in options)
        quickest = tuple(map(_quickest, linear.branches, options))
        found += [smallest, quickest]
    single = len(linear.branches) == 1
    return [
        groups for groups in dict.fromkeys(found) if groups == best or not (single and _is_matrix(linear, groups[0]))
    ]


def _quickest(branch: Branch, options: Sequence[Groups]) -> Groups:
    return min(options, key=lambda groups: multiply_adds(branch, groups))


def _is_matrix(linear: FactorizedLinear, groups: Groups) -> bool:
    """Whether all cores of a single branch are merged into what is as large as the matrix."""
    branch = linear.branches[0]
    labels = {label for core in branch.cores for label in core.labels}
    ends = dict((*branch.in_modes, *branch.out_modes))
    size = prod(size for label, size in ends.items() if label in labels)
    return len(groups) == 1 and size >= linear.in_features * linear.out_features


#: Forms that a user may ask for by name wherever they are not absurd.
_PLAIN = ("chain", "chain:reversed")


def _pruned(forms: Sequence[NetworkForm], stored: NetworkForm, dense: NetworkForm) -> list[NetworkForm]:
    """Without forms beaten in every respect by another, and at most `_FORMS`; simple orders stay unless far worse."""
    names: dict[str, NetworkForm] = {}
    for form in forms:
        names.setdefault(form.name, form)
    kept: list[NetworkForm] = []
    for form in sorted(names.values(), key=lambda form: (form.elements, form.macs, _moved(form), form.nodes)):
        limit = NAIVE * dense.macs if form.name in _PLAIN else min(2 * stored.macs, NAIVE * dense.macs)
        simple = form.name.startswith("chain") and form.macs <= limit
        if simple or not any(_beats(other, form) for other in (stored, *kept, dense)):
            kept.append(form)
    if len(kept) > _FORMS:
        step = (len(kept) - 1) / (_FORMS - 1)
        kept = [kept[round(index * step)] for index in range(_FORMS)]
    return kept


def _beats(better: NetworkForm, form: NetworkForm) -> bool:
    """In every respect, the width of the narrowest product included."""
    return (
        better.elements <= form.elements
        and better.macs <= form.macs
        and _moved(better) <= _moved(form)
        and _working(better) <= _working(form)
        and _width(better) >= _width(form)
    )


def _working(form: NetworkForm) -> int:
    """Operators that do more than arrange the activation: what is arranged counts by numbers moved."""
    return sum(operation.kind not in ("reshape", "transpose") for operation in form.operations)


def _width(form: NetworkForm) -> int:
    """Columns of the narrowest left product, or `LEFT_SUFFIX` where none is narrower."""
    left = [op.rows for op in form.operations if op.kind == "left" and op.tokens == "batch"]
    return min(LEFT_SUFFIX, *left) if left else LEFT_SUFFIX


def _moved(form: NetworkForm) -> int:
    return sum(operation.moved for operation in form.operations)


def _operations(network: FactorizedLinear, programs: Sequence[Sequence[Instruction]]) -> Iterator[Operation]:
    """What `lower.network_function` emits for ``network``."""
    out = network.out_features
    branches = network.branches
    for size in dict.fromkeys(branch.in_size for branch in branches):
        if size > network.in_features:
            yield Operation("pad", moved=network.in_features + size)
    alike = len({(branch.scale, branch.out_size) for branch in branches}) == 1
    for branch, instructions in zip(branches, programs, strict=True):
        yield from (_operation(instruction) for instruction in instructions)
        if not alike:
            yield from _finished(branch.out_size, out, branch.scale)
    for _ in branches[1:]:
        yield Operation("elementwise", moved=3 * (branches[0].out_size if alike else out))
    if alike:
        yield from _finished(branches[0].out_size, out, branches[0].scale)
    if network.sparse is not None:
        yield Operation("sparse", weights=network.sparse.nnz, moved=2 * network.sparse.nnz + 2 * out)
    if network.bias is not None:
        yield Operation("elementwise", moved=2 * out)


def _finished(size: int, out: int, scale: float) -> Iterator[Operation]:
    if size > out:
        yield Operation("pad", moved=2 * out)
    if scale != 1.0:
        yield Operation("elementwise", moved=2 * out)


def _operation(step: Instruction) -> Operation:
    if isinstance(step, Transpose):
        one_by_one = step.block == 1 and step.simple
        return Operation("transpose", inner=0 if one_by_one else step.block, moved=2 * step.size)
    if not isinstance(step, Product):
        return Operation("reshape")
    if step.form == "scale":
        return Operation("elementwise", weights=step.batch, moved=2 * step.batch * step.rows)
    weights = step.inner * step.columns
    if step.form == "left":
        return Operation("left", step.batch, step.rows, step.inner, step.columns, weights, tokens="batch")
    if len(step.layout) == 3:
        return Operation("batched", step.batch, step.rows, step.inner, step.columns, step.batch * weights)
    return Operation("right", 1, step.rows, step.inner, step.columns, weights)
