"""What to sweep over and how much to measure; nothing heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixt_export.compression.families import FAMILIES
from mixt_export.compression.method import get_method
from mixt_export.compression.settings import Settings
from mixt_export.errors import UnsupportedError, UsageError

#: The name under which sample.questions.mmlu_dev is asked for.
MMLU_DEV = "mmlu-dev"

#: Arguments of compress that a sweep varies beside the number of blocks, and their values unless given; a method is
#: swept over the first that it has.
VARIED: dict[str, tuple[float, ...]] = {"n_tensors": (4,), "keep": (0.9,)}

_RANGE = re.compile(r"([0-9]{1,6}):([0-9]{1,6})(?::([0-9]{1,6}))?")
_NUMBER = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class Variant:
    """One curve of a sweep: ``argument`` of compress (``n_tensors`` or ``keep``) at ``value``."""

    argument: str
    value: float

    @property
    def label(self) -> str:
        """As tables and legends show it."""
        return f"N_T = {self.value:g}" if self.argument == "n_tensors" else f"keep {self.value:g}"

    def to_dict(self) -> dict[str, float]:
        """As sweep.json holds it."""
        return {self.argument: self.value}


@dataclass(frozen=True)
class SweepOptions:
    """Arguments of a sweep.

    ``method``: any of compress. ``n_tensors``: the N_T of method mixt, one curve each; ``keep``: shares of parameters,
    one curve each, of low rank methods (empty: see VARIED). ``blocks``: see parse_counts; None: 0, 1, 2, 4, 8, … and
    all. ``refine_steps`` (MixT), ``calib``, ``calib_windows`` (None: its default) and ``seed`` go to compress,
    ``recover_steps`` (0: none) to recover. ``texts``: UTF-8 files to score; empty: the shipped evaluation texts. Of
    each the first ``windows`` windows of ``window`` tokens. ``questions``: "mmlu-dev" or a JSONL file, at most
    ``limit`` of them (None: all), scored by ``scoring`` (see evaluation.multiple_choice). ``threads``: 0 takes half
    the cores.
    ``overwrite``: start anew where rows measured otherwise lie.
    """

    method: str = "mixt"
    n_tensors: tuple[int, ...] = ()
    keep: tuple[float, ...] = ()
    blocks: str | None = None
    refine_steps: int = 0
    recover_steps: int = 0
    texts: tuple[Path, ...] = ()
    calib: tuple[str, ...] = ()
    calib_windows: int | None = None
    questions: str = MMLU_DEV
    limit: int | None = 64
    scoring: str = "letters"
    windows: int = 4
    window: int = 512
    threads: int = 0
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError naming the first option that makes no sense."""
        for name, least in (("refine_steps", 0), ("recover_steps", 0), ("windows", 1), ("window", 2), ("threads", 0)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: give a number of at least {least}."
                )
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit {self.limit}: give at least 1 question.")

    def variants(self) -> list[Variant]:
        """The curves, in the order given, each once.

        Raises UnsupportedError for a method that is unknown or has no such argument,
        UsageError for values of an argument that it does not have.
        """
        names = FAMILIES[get_method(self.method).family].option_names
        argument = next((name for name in VARIED if name in names), None)
        if argument is None:
            sizes = ", ".join(f"--{name.replace('_', '-')}" for name in VARIED)
            raise UnsupportedError(
                f"--method {self.method} has none of the sizes that a sweep varies ({sizes}); choose another method."
            )
        for other in VARIED:
            if other != argument and getattr(self, other):
                raise UsageError(
                    f"--{other.replace('_', '-')} does not apply to method {self.method}; a sweep of it varies "
                    f"--{argument.replace('_', '-')}."
                )
        values: tuple[float, ...] = getattr(self, argument) or VARIED[argument]
        return [Variant(argument, value) for value in dict.fromkeys(values)]


def parse_counts(text: str | None, blocks: int) -> list[int]:
    """The numbers of blocks to replace, ascending, each once; 0 is the dense model and always among them.

    ``text``: a list ``0,1,2,4,8`` whose items may be ranges ``START:STOP`` or ``START:STOP:STEP``, both ends included;
    None: 0, 1, 2, 4, 8, … and all. Raises UsageError for other text and for more than the model's ``blocks``.
    """
    if text is None:
        powers = [2**exponent for exponent in range(blocks.bit_length())]
        return sorted({0, *(power for power in powers if power <= blocks), blocks})
    found = {0}
    for item in text.split(","):
        part = item.strip()
        match = _RANGE.fullmatch(part)
        if match is not None:
            start, stop, step = int(match[1]), int(match[2]), int(match[3] or 1)
            if step == 0 or start > stop:
                raise UsageError(f"--blocks {text}: the range {part} never ends; write START:STOP:STEP, as 0:16:2.")
        elif _NUMBER.fullmatch(part):
            start = stop = int(part)
            step = 1
        else:
            raise UsageError(f"--blocks {text}: {part!r} is not understood; give numbers 0,1,2,4 or a range 0:16:2.")
        if stop > blocks:
            raise UsageError(f"--blocks {text}: the model has {blocks} blocks; give numbers from 0 to {blocks}.")
        found.update(range(start, stop + 1, step))
    if found == {0}:
        raise UsageError(f"--blocks {text}: replaces no block; give numbers from 1 to {blocks} as well.")
    return sorted(found)


def compress_arguments(options: SweepOptions, variant: Variant, blocks: int) -> dict[str, Any]:
    """Keywords of compress for the last ``blocks`` blocks; controls are left out, a sweep measures by itself."""
    names = FAMILIES[get_method(options.method).family].option_names
    arguments: dict[str, Any] = {
        "method": options.method,
        "blocks": f"last:{blocks}",
        variant.argument: variant.value,
        "calib": options.calib,
        "seed": options.seed,
    }
    if options.calib_windows is not None:
        arguments["settings"] = Settings(windows=options.calib_windows)
    if "controls" in names:
        arguments["controls"] = False
    if "refine_steps" in names or options.refine_steps:
        arguments["refine_steps"] = options.refine_steps
    return arguments


def variant_of(values: dict[str, Any]) -> Variant:
    """The variant that ``Variant.to_dict`` wrote."""
    ((argument, value),) = values.items()
    return Variant(argument, value)
