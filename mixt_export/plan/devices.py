"""What a CPU is to the planner: seconds per unit of each kind of work. Data only; `cost` says what a form amounts to.

`CPU` is the default: ONNX Runtime 1.31, one thread of a Xeon with AVX-512 and 2 MiB of second-level cache, fitted by
`mixt calibrate-device` to single operators (see docs/planner-cost.md). `mixt calibrate-device` measures another CPU.
A GPU is modelled in `gpu`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Device:
    """Seconds per unit of work of one CPU. Numbers are float32, in which it computes whatever the graph's dtype.

    ``cache``: bytes of an activation that stay in the nearest cache of any size; what an operator reads or writes
    beyond them is *far*. ``tile``: columns that a matrix product computes together.
    """

    name: str
    node: float
    """To start one operator."""
    mac: float
    """Per multiply-add of a matrix product, columns rounded up to whole tiles."""
    call: float = 0.0
    """Per product of a batch of products."""
    row: float = 0.0
    """Per row of a result, however few its columns."""
    stream: float = 0.0
    """Per weight read in the order of memory: of a right product, which packs it ahead, or of one row's."""
    pack: float = 0.0
    """Per number of a right-hand matrix that must be brought into tiles at run time: an activation that is near."""
    pack_far: float = 0.0
    """The same of a far one."""
    stack: float = 0.0
    """Per weight of a stack of matrices, which is not packed ahead, read once for a single row."""
    stack_packed: float = 0.0
    """The same where several rows make it worth packing at run time."""
    read: float = 0.0
    """Per number of a near activation that a product reads."""
    read_far: float = 0.0
    """The same of a far one."""
    write: float = 0.0
    """Per number of a near result of a product."""
    write_far: float = 0.0
    """The same of a far one."""
    block: float = 0.0
    """Per block of numbers that a permutation copies at once."""
    scatter: float = 0.0
    """Per number that a permutation of several axes moves alone."""
    transpose: float = 0.0
    """Per number that a permutation of a near activation reads or writes."""
    transpose_far: float = 0.0
    """The same of a far one."""
    move: float = 0.0
    """Per number that adding, scaling or padding near activations reads or writes."""
    move_far: float = 0.0
    """The same of far ones."""
    gather: float = 0.0
    """Per entry of a sparse matrix and token."""
    tile: int = 16
    cache: int = 1_500_000

    def as_dict(self) -> dict[str, str | float | int]:
        """All fields, as JSON holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


NUMBER = 4
"""Bytes of a number."""

RATES = tuple(field.name for field in fields(Device) if field.type == "float")
"""Names of the constants in seconds per unit."""

CPU = Device(
    "cpu",
    node=812e-9,
    mac=0.0185e-9,
    call=150e-9,
    row=7.4e-9,
    stream=0.319e-9,
    pack=0.238e-9,
    pack_far=0.45e-9,
    stack=0.391e-9,
    stack_packed=0.613e-9,
    read=0.0282e-9,
    read_far=0.23e-9,
    write=0.0921e-9,
    write_far=0.521e-9,
    block=6.45e-9,
    scatter=5.29e-9,
    transpose=0.191e-9,
    transpose_far=0.475e-9,
    move=0.164e-9,
    move_far=0.326e-9,
    gather=2e-9,
    cache=1_572_864,
)
