"""What a form executes, operator by operator and shape by shape: all that a cost model needs to know about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["right", "left", "batched", "transpose", "reshape", "elementwise", "pad", "sparse", "fused"]
"""What an operator does.

- ``right``: activation (T·rows, inner) times weight (inner, columns): one product, tokens folded into its rows;
- ``left``: weight (columns, inner) times activation (inner, rows), ``batch`` such products. Where ``tokens`` is
  ``batch`` every token has products of its own (T·batch of them, each ``rows`` wide: narrow where rows is small), where
  it is ``rows`` the tokens lie last and one product is T·rows wide;
- ``batched``: ``batch`` products side by side, activation (T·rows, inner) times a weight (inner, columns) of each;
- ``transpose``: only moves, ``inner`` numbers that lie together at once; ``inner`` is 0 where a single axis moves past
  its neighbours and nothing lies together, for which runtimes have a loop of its own;
- ``elementwise`` (adding terms, scaling, bias), ``pad`` (zeros added, features cut off): only move;
- ``reshape``: moves nothing, but is an operator to start;
- ``sparse``: gather ``weights`` inputs, multiply, add them to the outputs;
- ``fused``: one operator for a whole linear; batch · rows · inner · columns are its multiply-adds per token.
"""

PRODUCTS: frozenset[Kind] = frozenset({"right", "left", "batched", "fused"})
"""Kinds that multiply matrices."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator of a form, per token: T tokens in a run make T times the rows (or the products) and the movement.

    ``rows``, ``inner`` and ``columns`` are a product's shape (see `Kind`), ``weights`` the numbers of weights it reads
    once however many tokens there are, ``moved`` the activation numbers per token that it reads and writes where moving
    is all it does (0 for products: their activations follow from the shape).
    """

    kind: Kind
    batch: int = 1
    rows: int = 0
    inner: int = 0
    columns: int = 0
    weights: int = 0
    moved: int = 0
    tokens: Literal["rows", "batch"] = "rows"

    @property
    def macs(self) -> int:
        """Multiply-adds per token: of a product its shape's, of a sparse matrix its entries'."""
        if self.kind == "sparse":
            return self.weights
        return self.batch * self.rows * self.inner * self.columns if self.kind in PRODUCTS else 0


def macs(operations: Iterable[Operation]) -> int:
    """Multiply-adds per token of all ``operations``; adding, scaling and bias are not counted."""
    return sum(operation.macs for operation in operations)


def weights(operations: Iterable[Operation]) -> int:
    """Numbers of weights that all ``operations`` read."""
    return sum(operation.weights for operation in operations)


def transposes(operations: Iterable[Operation]) -> int:
    """How often an activation is permuted."""
    return sum(operation.kind == "transpose" for operation in operations)
