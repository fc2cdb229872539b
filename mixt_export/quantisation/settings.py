"""What `--quantize` and the options beside it ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mixt_export.errors import UsageError

#: Names of `--quantize` -> bits of a weight.
BITS = {"int8": 8, "int4": 4}
#: Weights that share a scale, along the input features. Below 16 no kernel of ONNX Runtime takes them.
GROUPS = (16, 32, 64, 128)
ROUNDINGS = ("auto", "calibrated", "nearest")
#: Of the head and the embedding, where they are quantised and nothing was asked.
HEAD_BITS = 8
#: A matrix with fewer elements stays as it is: it lies in the cache of a core whatever its width.
MIN_ELEMENTS = 2048
#: Matrices that `--quantize int4` leaves at 8 bits, because of what they cost at 4 (docs/quantisation.md): the MLP's
#: last linear, which writes into the residual stream, and the second factor of low rank, whose inputs are uncorrelated,
#: so that no column can make up for another.
SENSITIVE = (r"\.mlp\.(down_proj|c_proj|fc_out)\b", r"\.core1$")
#: `--int8-for` for: none.
NOTHING = "none"


@dataclass(frozen=True)
class Quantisation:
    """Weight-only quantisation: ``bits`` and ``group`` of the linears, ``head_bits`` of the head and the embedding.

    ``group`` and ``head_bits`` None: what is best for the target, see layouts.Layout.
    ``rounding``: "nearest", "calibrated" (by the second moments of what each matrix reads), or "auto": calibrated
    where ONNX Runtime and a tokenizer are at hand. ``texts``: what to calibrate on, by default the shipped texts.
    ``measure``: whether the export measures what is lost. ``min_elements``: smaller matrices stay as they are.
    ``int8_for``: regular expressions; matrices whose name one is found in have 8 bits whatever ``bits`` is.
    ``int8_activations``: what products read becomes int8 too, wherever a product can be smoothed.
    """

    bits: int
    group: int | None = None
    head_bits: int | None = None
    rounding: str = "auto"
    texts: tuple[Path, ...] = ()
    measure: bool = True
    min_elements: int = MIN_ELEMENTS
    int8_for: tuple[str, ...] = ()
    int8_activations: bool = False

    @classmethod
    def named(
        cls,
        name: str,
        group: int | None = None,
        head: str | None = None,
        rounding: str = "auto",
        texts: tuple[Path, ...] = (),
        measure: bool = True,
        int8_for: tuple[str, ...] | None = None,
        activations: str | None = None,
    ) -> Quantisation:
        """The settings of ``--quantize name --group group --quantize-head head --rounding rounding``.

        ``int8_for``: None: SENSITIVE; (NOTHING,): none. ``activations``: of ``--activations``. Raises UsageError for a
        name, a group or a rounding that there is not, and for an expression that is none.
        """
        for option, value in (("--quantize", name), ("--quantize-head", head or name)):
            if value not in BITS:
                raise UsageError(f"{option} {value}: not a kind of integer of this version; choose int8 or int4.")
        if group is not None and group not in GROUPS:
            raise UsageError(f"--group {group}: the kernels take blocks of {', '.join(map(str, GROUPS))}.")
        if rounding not in ROUNDINGS:
            raise UsageError(f"--rounding {rounding}: choose one of {', '.join(ROUNDINGS)}.")
        if activations not in (None, "int8"):
            raise UsageError(f"--activations {activations}: not a kind of this version; choose int8, or leave it out.")
        if activations and name != "int8":
            raise UsageError(f"--activations int8 goes with --quantize int8, not with --quantize {name}.")
        wide = SENSITIVE if int8_for is None else int8_for
        wide = () if name == "int8" or wide == (NOTHING,) else wide
        for pattern in wide:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--int8-for {pattern}: is no regular expression ({error}).") from error
        return cls(
            BITS[name],
            group,
            BITS[head] if head else None,
            rounding,
            texts,
            measure,
            int8_for=wide,
            int8_activations=bool(activations),
        )

    def bits_of(self, names: Iterable[str], embedding: bool) -> int:
        """Bits of the matrix of a linear that goes by ``names``, or of the table of the embedding and the head."""
        if embedding:
            return self.head_bits or HEAD_BITS
        wide = any(re.search(pattern, name) for pattern in self.int8_for for name in names)
        return 8 if wide else self.bits
