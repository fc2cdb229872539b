"""One case: a folder with one file damaged is read. It may be read or refused with a documented error, nothing else.

A finding is any other exception, more CPU time or memory than such a folder can need, and any file opened outside it.
"""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import mutators
from tests.fuzz.guard import HangError, allowed_bytes, watched
from tests.fuzz.surfaces import SURFACES, Surface, pristine


@dataclass(frozen=True)
class Finding:
    """What went wrong in case ``seed`` of ``surface``, whose ``file`` was damaged."""

    surface: str
    seed: int
    file: str
    problem: str
    detail: str

    def __str__(self) -> str:
        return f"{self.surface}, seed {self.seed}, {self.file}: {self.problem}\n{self.detail}"


@dataclass
class Tally:
    """Counts of a campaign: ``outcomes`` are "read" or names of documented errors."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    most_bytes: int = 0

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values()) + len(self.findings)


class Bench:
    """Folders on disk for one campaign, with things beside them that must not be touched."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.outside = scratch / "secret"
        self.outside.mkdir()
        files = pristine("dense", scratch)
        for name in ("model.safetensors", "config.json"):
            (self.outside / name).write_bytes(files[name])

    def run(self, surface: Surface, seed: int, tally: Tally) -> None:
        """Damage, read, judge."""
        rng = np.random.default_rng([seed, *surface.name.encode()])
        files = pristine(surface.name, self.scratch)
        chosen = sorted(name for name in files if Path(name).name not in surface.skip)
        weights = np.array([3.0 if Path(name).suffix in (".json", ".safetensors", ".bin") else 1.0 for name in chosen])
        target = chosen[int(rng.choice(len(chosen), p=weights / weights.sum()))]
        folder = self.scratch / "case"
        size = self._write(folder, files, target, rng)
        problem = detail = ""
        outcome = "read"
        named = {str((folder / name).resolve()) for name in surface.named if (folder / name).exists()}
        with watched(folder, named) as watch:
            try:
                surface.read(folder)
            except surface.errors() as error:
                outcome = type(error).__name__
                if not str(error).strip():
                    problem, detail = "an error without a text", outcome
            except HangError:
                problem, detail = "hang", traceback.format_exc(limit=-6)
            except MemoryError:
                problem, detail = "out of memory", traceback.format_exc(limit=-6)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                problem, detail = f"undocumented {type(error).__name__}", traceback.format_exc(limit=-6)
        if not problem and watch.outside:
            problem, detail = "opened a file outside the folder", ", ".join(watch.outside[:3])
        peak = watch.peak
        if not problem and peak > allowed_bytes(size):
            # A reader needs as much again; what a library does once in a process (an import) does not come twice.
            with watched(folder, named) as watch, suppress(*surface.errors()):
                surface.read(folder)
            peak = min(peak, watch.peak)
        tally.most_bytes = max(tally.most_bytes, peak)
        if not problem and peak > allowed_bytes(size):
            problem, detail = "memory", f"{peak} bytes for a folder of {size}"
        if problem:
            tally.findings.append(Finding(surface.name, seed, target, problem, detail))
        else:
            tally.outcomes[outcome] += 1

    def _write(self, folder: Path, files: dict[str, bytes], target: str, rng: np.random.Generator) -> int:
        """Write the case; bytes of all its files."""
        if folder.exists():
            shutil.rmtree(folder)
        size = 0
        by_path = rng.random() < 0.06
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = mutators.damage(name, data, rng) if name == target and not by_path else data
            content = content.replace(b"{outside}", str(self.outside).encode())
            path.write_bytes(content)
            size += len(content)
            if name == target and by_path:
                mutators.damage_path(path, self.outside, rng)
        return size


def campaign(count: int, first_seed: int = 0, only: str | None = None) -> Iterator[Tally]:
    """Run ``count`` cases over all surfaces in turn; yields the growing tally after each."""
    tally = Tally()
    surfaces = [surface for surface in SURFACES if only in (None, surface.name)]
    with tempfile.TemporaryDirectory(prefix="mixt-fuzz-") as scratch:
        bench = Bench(Path(scratch))
        for index in range(count):
            bench.run(surfaces[index % len(surfaces)], first_seed + index, tally)
            yield tally


def last(tallies: Iterator[Tally]) -> Tally:
    """The last of ``tallies``."""
    result: Any = None
    for result in tallies:  # noqa: B007
        pass
    return result
