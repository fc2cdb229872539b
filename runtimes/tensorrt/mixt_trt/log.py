"""What TensorRT says while it works: kept, searched for traps, and read for its own memory figures."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

#: Messages of VERBOSE severity are not kept: there are thousands.
_KEPT = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")

#: What the libraries print per profile, in bytes, and the name under which a stamp records it.
FIGURES = {
    "Total Activation Memory": "activation_bytes",
    "Max Scratch Memory": "scratch_bytes",
    "Total Scratch Memory": "total_scratch_bytes",
    "Total Host Persistent Memory": "host_persistent_bytes",
    "Total Device Persistent Memory": "device_persistent_bytes",
}
_FIGURE = re.compile(rf"({'|'.join(FIGURES)})\s*:?\s*(\d+)")
#: Printed once, for all profiles.
_WEIGHTS = re.compile(r"Total Weights Memory\s*:?\s*(\d+)")

#: Messages of a build that "succeeds" though it computes something else than the graph says.
_TRAPS = (
    re.compile(r"Unused Input:|Input Tensor \S+ is unused", re.IGNORECASE),
    re.compile(r"Unknown attribute:\s*", re.IGNORECASE),
    re.compile(r"\battributes?\b.*\b(?:ignor\w*|dropp\w*|not supported|unsupported|no effect)\b", re.IGNORECASE),
    re.compile(r"\b(?:ignor\w*|dropping)\b.*\b(?:attributes?|field)\b", re.IGNORECASE),
)


@dataclass
class Log:
    """Messages in order: (severity, text)."""

    messages: list[tuple[str, str]] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        """Keep one message."""
        if severity in _KEPT:
            self.messages.append((severity, text.strip()))

    @property
    def errors(self) -> list[str]:
        """Texts of errors, oldest first."""
        return [text for severity, text in self.messages if severity in ("ERROR", "INTERNAL_ERROR")]

    @property
    def warnings(self) -> list[str]:
        """Texts of warnings, each once."""
        return list(dict.fromkeys(text for severity, text in self.messages if severity == "WARNING"))

    def traps(self) -> list[str]:
        """Warnings that something of the graph was left out: unused inputs, dropped attributes."""
        return [text for text in self.warnings if any(trap.search(text) for trap in _TRAPS)]

    def figures(self) -> dict[str, Any]:
        """The library's own memory figures in bytes: "weights_bytes" (None: not printed), and "profiles" in order."""
        profiles: list[dict[str, int]] = []
        weights = None
        for _, text in self.messages:
            for label, number in _FIGURE.findall(text):
                if not profiles or FIGURES[label] in profiles[-1]:
                    profiles.append({})
                profiles[-1][FIGURES[label]] = int(number)
            found = _WEIGHTS.search(text)
            weights = weights if found is None else int(found.group(1))
        return {"weights_bytes": weights, "profiles": profiles}


def make_logger(module: Any, log: Log) -> Any:
    """A logger of ``module`` that fills ``log``. The caller keeps it alive as long as anything made with it."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(str(severity).rpartition(".")[2], message)

    return Logger()
