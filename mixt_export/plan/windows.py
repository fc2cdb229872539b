"""Executable forms of a MixT linear: the same matrix, its terms merged more or less, as plain data.

Neighbouring terms merge into one of the same kind, for bond d and j terms from number k on:

    Σ_m I_(d^(k+m)) ⊗ T_(k+m) ⊗ I_(d^(N-1-k-m))  =  I_(d^k) ⊗ M ⊗ I_(d^(N-k-j)),
    M = Σ_m I_(d^m) ⊗ T_(k+m) ⊗ I_(d^(j-1-m))          of shape (d^(j-1) out/S, d^(j-1) in/S).

A partition of the N terms into contiguous groups is a form: all groups of one term are ``branches``, of two ``pairs``,
one group of all terms is ``dense``. A group (a *window*) costs d^(j-N) of the dense multiply-adds and d^(2j-2N) of the
dense bytes, so for d = 2 pairs cost what branches cost, with half as many products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mixt_export.network import FactorizedLinear
from mixt_export.plan.mixture import Mixture
from mixt_export.plan.operations import Operation

MAX_WINDOWS = 6
"""Windows of a form that merges terms; what graphs/ops has a function for."""

_ALL_PARTITIONS = 8
"""Terms up to which every partition is a form; beyond, groups of equal size only."""

Layout = Literal["right", "left"]
"""``right``: activation (rows, in) times weight (in, out), with two transposes for each window inside others.
``left``: weight (out, in) times activation (in, rows): one transpose of the input and one of the output."""


@dataclass(frozen=True, slots=True)
class Window:
    """I_left ⊗ M ⊗ I_right with M (rows, columns): terms ``first`` … ``first + count - 1`` merged.

    The numbers are those executed: of a padded linear only the ranges of the leading mode that hold features.
    """

    first: int
    count: int
    left: int
    rows: int
    columns: int
    right: int

    @property
    def elements(self) -> int:
        """Numbers in M."""
        return self.rows * self.columns

    @property
    def macs(self) -> int:
        """Multiply-adds per token."""
        return self.left * self.right * self.elements

    @property
    def in_size(self) -> int:
        """Features it reads, from the first on."""
        return self.left * self.columns * self.right

    @property
    def out_size(self) -> int:
        """Features it writes, from the first on."""
        return self.left * self.rows * self.right


@dataclass(frozen=True, slots=True)
class MixtForm:
    """One way to execute a MixT linear. Everything here follows from shapes: no weight is needed."""

    name: str
    layout: Layout
    windows: tuple[Window, ...]
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def partition(self) -> tuple[int, ...]:
        """Terms in each window."""
        return tuple(window.count for window in self.windows)

    @property
    def dense(self) -> bool:
        """Whether it is the plain matrix."""
        return len(self.windows) == 1

    @property
    def elements(self) -> int:
        """Numbers of weights the graph holds, bias not counted."""
        return sum(window.elements for window in self.windows)

    def nbytes(self, itemsize: int = 4) -> int:
        """Bytes of weights the graph holds, with ``itemsize`` bytes a number, bias not counted."""
        return itemsize * self.elements

    @property
    def macs(self) -> int:
        """Multiply-adds per token; adding windows and bias is not counted."""
        return sum(window.macs for window in self.windows)

    @property
    def transposes(self) -> int:
        """How often an activation is permuted."""
        if self.dense:
            return 0
        return 2 if self.layout == "left" else sum(2 for window in self.windows if window.right > 1)

    @property
    def transposed_features(self) -> int:
        """Numbers per token that those permutations move."""
        if self.dense:
            return 0
        if self.layout == "left":
            return self.in_features + self.out_features
        return sum(window.in_size + window.out_size for window in self.windows if window.right > 1)

    @property
    def padded(self) -> bool:
        """Whether some window reads or writes another number of features than the linear has."""
        sizes = (self.in_features, self.out_features)
        return any((window.in_size, window.out_size) != sizes for window in self.windows) and not self.dense

    @property
    def nodes(self) -> int:
        """Operators executed: products, permutations, reshapes, sums, padding, bias."""
        return len(self.operations)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Every operator executed, in order."""
        if self.dense:
            matrix = self.windows[0]
            found = [Operation("right", 1, 1, matrix.columns, matrix.rows, matrix.elements)]
        else:
            found = list(self._left() if self.layout == "left" else self._right())
        if self.bias:
            found.append(Operation("elementwise", moved=2 * self.out_features))
        return tuple(found)

    def _right(self) -> Iterator[Operation]:
        for number, window in enumerate(self.windows):
            inside = window.right > 1
            if self.padded:
                yield Operation("pad", moved=self.in_features + window.in_size)
            yield from (_RESHAPE, Operation("transpose", moved=2 * window.in_size)) if inside else ()
            yield _RESHAPE
            rows = window.left * window.right
            yield Operation("right", 1, rows, window.columns, window.rows, window.elements)
            yield from (_RESHAPE, Operation("transpose", moved=2 * window.out_size)) if inside else ()
            yield _RESHAPE
            if self.padded:
                yield Operation("pad", moved=window.out_size + self.out_features)
            if number:
                yield Operation("elementwise", moved=3 * self.out_features)

    def _left(self) -> Iterator[Operation]:
        yield from (_RESHAPE, Operation("transpose", moved=2 * self.in_features))
        for number, window in enumerate(self.windows):
            yield _RESHAPE
            yield Operation("left", window.left, window.right, window.columns, window.rows, window.elements)
            yield _RESHAPE
            if number:
                yield Operation("elementwise", moved=3 * self.out_features)
        yield Operation("transpose", moved=2 * self.out_features)
        yield from (_RESHAPE,) * 4  # the leading sizes of the input are read off and joined with the features


_RESHAPE = Operation("reshape")


def mixt_forms(linear: FactorizedLinear, *, crop: bool = True) -> list[MixtForm]:
    """Every executable form of ``linear``, ``branches`` first and ``dense`` last; empty when it is no MixT.

    crop: execute a padded linear only on the ranges of the leading modes that hold features, which is exact. Without
    it the forms are those of the padded sizes, as the paper counts them.
    """
    mixture = Mixture.of(linear)
    return [] if mixture is None else list(mixture_forms(mixture, crop=crop, bias=linear.bias is not None))


@lru_cache(maxsize=4096)
def mixture_forms(mixture: Mixture, *, crop: bool = True, bias: bool = False) -> tuple[MixtForm, ...]:
    """See mixt_forms."""
    found = []
    padded_out, padded_in = mixture.padded_features
    features = (mixture.in_features, mixture.out_features) if crop else (padded_in, padded_out)
    for name, partition in _partitions(len(mixture.terms)):
        windows = tuple(_windows(mixture, partition, crop=crop))
        found.append(MixtForm(name, "right", windows, *features, bias))
        if len(windows) > 1 and not found[-1].padded and len(windows) <= MAX_WINDOWS:
            found.append(MixtForm(f"{name}-left", "left", windows, *features, bias))
    return tuple(found)


def _windows(mixture: Mixture, partition: tuple[int, ...], *, crop: bool) -> Iterator[Window]:
    bond, terms, first = mixture.bond, len(mixture.terms), 0
    for count in partition:
        left, right = bond**first, bond ** (terms - first - count)
        rows, columns = (size * bond ** (count - 1) for size in mixture.core_shape)
        if crop and left == 1:  # the features fill the first rows and columns of the matrix itself
            rows, columns = -(-mixture.out_features // right), -(-mixture.in_features // right)
        elif crop:  # block α reads block α and writes block α: those beyond the features are zero, or cut off
            left = min(-(-mixture.out_features // (rows * right)), -(-mixture.in_features // (columns * right)))
        yield Window(first, count, left, rows, columns, right)
        first += count


def _partitions(terms: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and partitions; groups of equal size (the last may be smaller) have short names."""
    named = {_equal(terms, size): f"merged:{size}" for size in range(3, terms)}
    named |= {_equal(terms, 1): "branches", _equal(terms, 2): "pairs", (terms,): "dense"}
    every = list(_compositions(terms)) if terms <= _ALL_PARTITIONS else list(named)
    every.sort(key=lambda partition: (-len(partition), partition not in named, partition))
    return [
        (named.get(partition, "merged:" + "+".join(map(str, partition))), partition)
        for partition in every
        if len(partition) in (terms, *range(1, MAX_WINDOWS + 1))
    ]


def _equal(terms: int, size: int) -> tuple[int, ...]:
    whole, rest = divmod(terms, size)
    return (size,) * whole + ((rest,) if rest else ())


def _compositions(total: int) -> Iterator[tuple[int, ...]]:
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        for rest in _compositions(total - first):
            yield (first, *rest)
