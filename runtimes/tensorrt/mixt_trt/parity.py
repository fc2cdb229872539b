"""Does the engine compute what PyTorch computed? Without PyTorch: against the golden tensors of the export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .decoder import Decoder
from .golden import Case, Golden

_PARTS = ("keys", "values")


@dataclass
class CaseResult:
    """Errors of one case; all relative L2. ``diverging``: the first place where norms leave the tolerance, or None."""

    name: str
    logits: float
    norms: float
    tokens: int
    wrong_tokens: int
    finite: bool
    diverging: str | None


@dataclass
class ParityResult:
    """All cases; ``minimum_tolerance`` is the logits tolerance that would have passed."""

    cases: list[CaseResult] = field(default_factory=list)
    logits_tolerance: float = 0.0
    norms_tolerance: float = 0.0

    @property
    def minimum_tolerance(self) -> float:
        """Largest error of logits over the cases."""
        return max(case.logits for case in self.cases)

    @property
    def diverging(self) -> str | None:
        """The first place where a case that failed leaves the tolerance."""
        failed = [case.diverging for case in self.cases if not self.passed_case(case) and case.diverging]
        return min(failed, key=_depth) if failed else None

    def passed_case(self, case: CaseResult) -> bool:
        """Finite, every top token right up to ties, errors within the tolerances."""
        close = case.logits <= self.logits_tolerance and case.norms <= self.norms_tolerance
        return case.finite and close and not case.wrong_tokens

    @property
    def passed(self) -> bool:
        """Whether every case passed."""
        return all(self.passed_case(case) for case in self.cases)


def check_parity(
    decoder: Decoder, golden: Golden, *, tolerance: float | None = None, layers: bool = False
) -> ParityResult:
    """Run every golden case through ``decoder``: prompt at once, then token by token.

    ``layers``: the decoder's engine puts out every block, compare their norms too. ``tolerance`` replaces the recorded
    one of logits. Raises TrtError when the engine cannot be run.
    """
    result = ParityResult(
        logits_tolerance=golden.logits_tolerance if tolerance is None else tolerance,
        norms_tolerance=golden.norms_tolerance,
    )
    for case in golden.cases:
        result.cases.append(_check(decoder, case, result, layers))
    return result


def _check(decoder: Decoder, case: Case, bars: ParityResult, layers: bool) -> CaseResult:
    hidden: npt.NDArray[np.float64] = np.full(case.hidden.shape, np.nan)

    def observe(first: int, outputs: list[npt.NDArray[Any]]) -> None:
        for layer, values in enumerate(outputs):
            hidden[layer, first : first + len(values)] = np.sqrt((values**2).sum(axis=-1))

    decoder.observe = observe if layers else None
    decoder.truncate(0)
    rows = [decoder.prefill([case.tokens[: case.prompt]])]
    rows += [decoder.step([token]) for token in case.tokens[case.prompt :]]
    found = np.concatenate(rows)
    decoder.observe = None
    # Per layer in the order of computation: keys and values of a block come before its output.
    names, norms, expected = [], [], []
    cache = decoder.cache_norms()
    for layer in range(len(case.hidden)):
        for part, label in enumerate(_PARTS):
            names.append(f"{label} of layer {layer}")
            norms.append(cache[layer, part])
            expected.append(case.cache[layer, part])
        if layers:
            names.append(f"output of layer {layer}")
            norms.append(hidden[layer])
            expected.append(case.hidden[layer])
    errors = [_relative(a, b) for a, b in zip(norms, expected, strict=True)]
    places = zip(names, errors, strict=True)
    diverging = next((name for name, error in places if not error <= bars.norms_tolerance), None)
    logits = _relative(found, case.logits)
    if diverging is None and not logits <= bars.logits_tolerance:
        diverging = f"the end: after the keys and values of layer {len(case.hidden) - 1}, or the final norm or head"
    return CaseResult(
        name=case.name,
        logits=logits,
        norms=max(errors, key=lambda error: np.inf if np.isnan(error) else error),
        tokens=len(found),
        wrong_tokens=_wrong(found, case.logits, bars.logits_tolerance),
        finite=bool(np.isfinite(found).all() and np.isfinite(errors).all()),
        diverging=diverging,
    )


def _relative(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected) / size) if size else float(np.linalg.norm(found))


def _wrong(found: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float) -> int:
    """Rows whose top token differs, though the reference prefers its own by more than the tolerance allows to move."""
    top, right = found.argmax(axis=1), expected.argmax(axis=1)
    rows = np.arange(len(found))
    margin = expected[rows, right] - expected[rows, top]
    return int(((top != right) & (margin > 2 * tolerance * np.abs(expected).max(axis=1))).sum())


def _depth(place: str) -> float:
    """Order of places: layer by layer, the end last."""
    words = place.split()
    return float(words[3]) + _PARTS_ORDER[words[0]] if words[1] == "of" else np.inf


_PARTS_ORDER = {"keys": 0.0, "values": 0.1, "output": 0.2}
