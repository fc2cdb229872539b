"""Put one fault into a copy of a clean export and ask verify."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from mixt_export.errors import MixtError, ParityError
from mixt_export.verification import VerifyOptions, verify
from tests.verification.faults.exported import Exported
from tests.verification.faults.registry import FILES, FIRST, LAYER, Kind


@dataclass(frozen=True)
class Outcome:
    """``exit_code`` as `mixt verify` would end; ``caught_by``: checks that failed, or "refused"."""

    exit_code: int
    caught_by: list[str] = field(default_factory=list)
    where: str = ""
    part: str = ""
    reason: str = ""
    needed: float | None = None
    seconds: float = 0.0

    @property
    def caught(self) -> bool:
        return self.exit_code in (2, ParityError.exit_code)


def attempt(kind: Kind, clean: Path, model: Path, folder: Path, layer: int, options: VerifyOptions) -> Outcome:
    """Raises NotApplicable where the model has nothing to break in this way. ``folder`` must not exist."""
    exported = Exported(clean, folder)
    kind.inject(exported, layer)
    return judged(exported.save(), model, options)


def judged(folder: Path, model: Path, options: VerifyOptions) -> Outcome:
    """What `mixt verify` says of ``folder``."""
    began = time.process_time()
    try:
        report = verify(folder, model, options=options)
    except MixtError as error:
        return Outcome(error.exit_code, ["refused"], reason=str(error), seconds=time.process_time() - began)
    failed = [check for check in report.checks if not check.passed]
    found = next((check for check in failed if check.where), None)
    return Outcome(
        ParityError.exit_code if failed else 0,
        [check.name for check in failed],
        found.where if found else "",
        found.part if found else "",
        failed[0].reason if failed else "",
        report.minimum_tolerance,
        time.process_time() - began,
    )


def expected(kind: Kind, layer: int) -> str:
    """What verify must name."""
    known = {LAYER: f"model.layers.{layer}", FIRST: "model.layers.0", FILES: ""}
    return known.get(kind.where, kind.where)
