"""What `--quantize` and the options beside it ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixt_export.errors import UsageError

#: Names of `--quantize` -> bits of a weight.
BITS = {"int8": 8, "int4": 4}
#: Weights that share a scale, along the input features. Below 16 no kernel of ONNX Runtime takes them.
GROUPS = (16, 32, 64, 128)
ROUNDINGS = ("auto", "calibrated", "nearest")
DEFAULT_GROUP = 32
#: A matrix with fewer elements stays as it is: it lies in the cache of a core whatever its width.
MIN_ELEMENTS = 2048


@dataclass(frozen=True)
class Quantisation:
    """Weight-only quantisation: ``bits`` and ``group`` of the linears, ``head_bits`` of the head and the embedding.

    ``rounding``: "nearest", "calibrated" (by the second moments of what each matrix reads), or "auto": calibrated
    where ONNX Runtime and a tokenizer are at hand. ``texts``: what to calibrate on, by default the shipped texts.
    ``measure``: whether the export measures what is lost. ``min_elements``: smaller matrices stay as they are.
    """

    bits: int
    group: int = DEFAULT_GROUP
    head_bits: int = 8
    rounding: str = "auto"
    texts: tuple[Path, ...] = ()
    measure: bool = True
    min_elements: int = MIN_ELEMENTS

    @classmethod
    def named(
        cls,
        name: str,
        group: int = DEFAULT_GROUP,
        head: str | None = None,
        rounding: str = "auto",
        texts: tuple[Path, ...] = (),
        measure: bool = True,
    ) -> Quantisation:
        """The settings of ``--quantize name --group group --quantize-head head --rounding rounding``.

        Raises UsageError for a name, a group or a rounding that there is not.
        """
        for option, value in (("--quantize", name), ("--quantize-head", head or name)):
            if value not in BITS:
                raise UsageError(f"{option} {value}: not a kind of integer of this version; choose int8 or int4.")
        if group not in GROUPS:
            raise UsageError(f"--group {group}: the kernels take blocks of {', '.join(map(str, GROUPS))}.")
        if rounding not in ROUNDINGS:
            raise UsageError(f"--rounding {rounding}: choose one of {', '.join(ROUNDINGS)}.")
        return cls(BITS[name], group, BITS[head] if head else 8, rounding, texts, measure)

    def bits_of(self, embedding: bool) -> int:
        """Bits of a linear's matrix, or of the table of the embedding and the head."""
        return self.head_bits if embedding else self.bits
