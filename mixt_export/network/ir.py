"""The intermediate representation: a factorised linear is a sum of tensor networks with one input and one output.

A label stands for an index. It has one size in a branch. Where it occurs says what it does:

- in the input modes and in cores, not in the output modes: contracted with the input;
- in the output modes and in cores, not in the input modes: produced;
- in cores alone: a bond, summed (in three or more cores: a hyperedge, as BLAST's rank);
- in the input modes, the output modes and in cores: a batch label (block-diagonal factors: Monarch, BTT);
- in the input modes and the output modes and in no core: passes through, an identity (MixT's spectator bonds).

Two cores may name the same tensor, within a linear or across linears: it is stored and counted once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mixt_export.network import checks

Mode = tuple[str, int]
"""A label and its size."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of a checkpoint by name, not its values.

    ``shape`` may be empty (a scalar); ``dtype`` is a numpy (or ml_dtypes) name such as ``float32`` or ``bfloat16``.
    Raises NetworkError when the name is empty, an axis is negative or the dtype is unknown.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        checks.check_tensor(self)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes when stored in ``dtype``."""
        return self.size * checks.ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Core:
    """A tensor of a network with one label per axis.

    Raises NetworkError when labels and axes differ in number, a label repeats, an axis is empty or the dtype is not
    a floating one.
    """

    tensor: TensorRef
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        checks.check_core(self)

    def modes(self) -> tuple[Mode, ...]:
        """Labels with their sizes, in the order of the axes."""
        return tuple(zip(self.labels, self.tensor.shape, strict=True))


@dataclass(frozen=True, slots=True)
class Branch:
    """One tensor network: x (tokens, ∏ in_modes) ↦ scale · network(x) (tokens, ∏ out_modes).

    Modes are ordered and row-major: the first label is the most significant part of the feature index. With
    ``padded`` the products may exceed the linear's features: the input is zero-padded and the output cropped, both
    at the end. Raises NetworkError when a label has two sizes, an output label cannot be reached, an input label is
    read by nobody, or a bond has one end only.
    """

    in_modes: tuple[Mode, ...]
    out_modes: tuple[Mode, ...]
    cores: tuple[Core, ...]
    scale: float = 1.0
    padded: bool = False

    def __post_init__(self) -> None:
        checks.check_branch(self)

    @property
    def in_size(self) -> int:
        """Product of the input modes."""
        return prod(size for _, size in self.in_modes)

    @property
    def out_size(self) -> int:
        """Product of the output modes."""
        return prod(size for _, size in self.out_modes)

    def sizes(self) -> dict[str, int]:
        """Size of every label, in order of first appearance: input, cores, output."""
        found = dict(self.in_modes)
        for core in self.cores:
            found.update(core.modes())
        found.update(self.out_modes)
        return found


@dataclass(frozen=True, slots=True)
class SparseResidual:
    """Coordinates of a sparse (out, in) matrix that is added to the branches: COO, three vectors of equal length.

    ``rows`` (output index) and ``cols`` (input index) are int32 or int64; entries that name one position twice add.
    Raises NetworkError on unequal lengths or wrong dtypes.
    """

    rows: TensorRef
    cols: TensorRef
    values: TensorRef

    def __post_init__(self) -> None:
        checks.check_sparse(self)

    @property
    def nnz(self) -> int:
        """Stored entries."""
        return self.values.size


@dataclass(frozen=True, slots=True)
class FactorizedLinear:
    """A linear layer y = Σ_branches scale · network(x) + sparse · x + bias, x (..., in), y (..., out).

    ``name`` is the module path without ``.weight``; ``method`` says what made the factors and has no effect on the
    mathematics. Raises NetworkError naming the linear when the modes do not multiply up to the features, the bias has
    another length than the output, or one tensor name stands for two shapes or dtypes.
    """

    name: str
    in_features: int
    out_features: int
    branches: tuple[Branch, ...]
    bias: TensorRef | None = None
    method: str = ""
    sparse: SparseResidual | None = None

    def __post_init__(self) -> None:
        checks.check_linear(self)

    def references(self) -> Iterator[TensorRef]:
        """Every use of a tensor, in order: cores, sparse rows, cols, values, bias. A shared tensor comes repeatedly."""
        for branch in self.branches:
            for core in branch.cores:
                yield core.tensor
        if self.sparse is not None:
            yield from (self.sparse.rows, self.sparse.cols, self.sparse.values)
        if self.bias is not None:
            yield self.bias

    def tensors(self) -> tuple[TensorRef, ...]:
        """Each named tensor once, in order of first use: cores, sparse rows, cols, values, bias."""
        return tuple({tensor.name: tensor for tensor in self.references()}.values())

    def core_tensors(self) -> tuple[TensorRef, ...]:
        """Each named core tensor once, in order of first use."""
        return tuple({core.tensor.name: core.tensor for branch in self.branches for core in branch.cores}.values())

    @property
    def params(self) -> int:
        """Stored numbers: cores, sparse values and bias, a named tensor once; sparse indices are not parameters."""
        indices = set() if self.sparse is None else {self.sparse.rows.name, self.sparse.cols.name}
        return sum(tensor.size for tensor in self.tensors() if tensor.name not in indices)

    @property
    def nbytes(self) -> int:
        """Stored bytes of everything, sparse indices included, a named tensor once."""
        return sum(tensor.nbytes for tensor in self.tensors())
