"""Which integers a dialect's products take: blocks of inputs, or one scale for each output.

TensorRT multiplies by INT8 weights of one scale per output and by INT4 weights in blocks, scales positive and of the
graph's dtype (its documentation, "Working with Quantized Types"); its parser reads INT4 from opset 21 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mixt_export.errors import UnsupportedError
from mixt_export.quantisation.settings import HEAD_BITS, Quantisation


@dataclass(frozen=True)
class Layout:
    """``by_row``: bits of a weight that go with one scale for each output; all others lie in blocks.

    ``positive``: scales are positive and exact in the dtype of the graph. ``whole_blocks``: a last block may not be
    short. ``tables``: the embedding and the head become integers as well. ``lacks``: bits that there are not, and what
    to do about it. ``groups``: bits -> inputs in a block where nothing else was asked for; none
    of those in ``by_row``.
    """

    by_row: frozenset[int] = frozenset()
    positive: bool = False
    whole_blocks: bool = False
    tables: bool = True
    lacks: Mapping[int, str] = field(default_factory=dict)
    # ONNX Runtime rounds activations in the same blocks, which is most of what int8 loses.
    groups: Mapping[int, int] = field(default_factory=lambda: {8: 16, 4: 32})

    def settled(self, settings: Quantisation) -> Quantisation:
        """``settings`` with nothing left open. Raises UnsupportedError for what this layout does not have."""
        if settings.bits in self.lacks:
            raise UnsupportedError(f"--quantize int{settings.bits}: {self.lacks[settings.bits]}")
        if settings.head_bits is not None and not self.tables:
            raise UnsupportedError(
                "--quantize-head: a TensorRT graph keeps the embedding and the head in its dtype; leave it out."
            )
        if settings.group is not None and settings.bits in self.by_row:
            raise UnsupportedError(
                f"--group {settings.group}: int{settings.bits} weights of a TensorRT graph have one scale for each "
                "output; leave it out."
            )
        group, head = settings.group or self.groups.get(settings.bits), settings.head_bits or HEAD_BITS
        return replace(settings, group=group, head_bits=head if self.tables else None)

    def fitted(self, bits: int, group: int | None, columns: int) -> tuple[int, int]:
        """Bits and group of a matrix with ``columns`` inputs for which ``bits`` and ``group`` were asked.

        Where blocks have to be whole and are not, 8 bits with one scale a row.
        """
        if group is None or bits in self.by_row or (self.whole_blocks and columns % group):
            return 8, columns
        return bits, group


_TENSORRT: dict[str, Any] = {
    "by_row": frozenset([8]),
    "positive": True,
    "whole_blocks": True,
    "tables": False,
    "groups": {4: 64},
}

#: Dialect -> its layout.
LAYOUTS: dict[str, Layout] = {
    "ort": Layout(),
    "portable": Layout(),
    "trt11": Layout(**_TENSORRT),
    "trt10": Layout(
        **_TENSORRT,
        lacks={
            4: "blocks of 4 bits are of opset 21, which the parser of JetPack 6's TensorRT does not read; choose "
            "--quantize int8, or JetPack 7 (--jetpack 7)."
        },
    ),
}


def layout_of(dialect: str) -> Layout:
    """The layout of a dialect. Raises UnsupportedError for one without."""
    layout = LAYOUTS.get(dialect)
    if layout is None:
        raise UnsupportedError(
            f"--quantize: the dialect {dialect} has no weights of few bits; export for another target."
        )
    return layout
