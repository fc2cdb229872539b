"""The report: a value, its JSON (report.schema.json) and where it is written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixt_export.verification.gate import DtypeCost
from mixt_export.verification.memory.measure import MemoryReport
from mixt_export.verification.result import CheckResult

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).parent / "report.schema.json"


@dataclass(frozen=True)
class LayerError:
    """Relative L2 of one block's output against PyTorch float32, and above what it counts as diverging."""

    name: str
    rel_l2: float
    threshold: float
    dtype_cost: float | None = None


@dataclass(frozen=True)
class Report:
    """What verify found. ``minimum_tolerance`` is the relative L2 that would have passed (None: nothing finite)."""

    tool_version: str
    created: str
    exported: str
    reference: str
    dialect: str
    dtype: str
    tolerance: float
    tolerance_origin: str
    minimum_tolerance: float | None
    checks: list[CheckResult]
    layers: list[LayerError] = field(default_factory=list)
    dtype_cost: DtypeCost | None = None
    memory: MemoryReport | None = None
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def first_diverging_layer(self) -> str:
        """The first failed check's finding, or an empty string."""
        return next((check.where for check in self.checks if not check.passed and check.where), "")

    @property
    def fault(self) -> str:
        """The first failed check's finding with the part it could name: ``model.layers.7: mlp.up_proj``."""
        found = next((check for check in self.checks if not check.passed and check.where), None)
        return "" if found is None else f"{found.where}: {found.part}" if found.part else found.where

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become null."""
        body = {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "first_diverging_layer": self.first_diverging_layer or None,
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(self)},
        }
        plain: dict[str, Any] = _plain(body)
        return plain

    def verdict(self) -> str:
        """The last line a user reads."""
        if self.passed:
            return "PASSED"
        failed = next(check for check in self.checks if not check.passed)
        where = self.fault
        return (
            f"FAILED (first diverging layer {where})" if where else f"FAILED ({failed.title.lower()}: {failed.reason})"
        )

    def write(self, folder: Path) -> None:
        """Write report.json and report.html into ``folder``; each appears whole or not at all."""
        from mixt_export.verification.html import render

        text = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        write_whole(folder / "report.json", text)
        write_whole(folder / "report.html", render(self))


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file beside ``path``, then rename it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value
