"""Where a recovery stands, on disk beside the output: enough to go on after an interruption as if there was none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mixt_export.compression.recover.report import Check
from mixt_export.errors import UsageError

_FILE = "state.safetensors"
_KEY = "recover"


@dataclass
class State:
    """After ``step`` steps. ``tensors``: parameters (``now:`` + name), the best ones (``best:``), the optimiser's
    (``first:``, ``second:``), float32.
    """

    step: int
    best_step: int
    checks: list[Check] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class StateFolder:
    """``<output>.recover``: one safetensors file, replaced as a whole, with the ``fingerprint`` of the arguments."""

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.path = output.absolute().with_name(f"{output.name}.recover")
        self.fingerprint = fingerprint

    def save(self, state: State) -> None:
        """Replace what was saved before; an interruption leaves the one or the other."""
        self.path.mkdir(parents=True, exist_ok=True)
        about = {
            "fingerprint": self.fingerprint,
            "step": state.step,
            "best_step": state.best_step,
            "checks": [asdict(check) for check in state.checks],
        }
        fresh = self.path / f"{_FILE}.new"
        save_file(state.tensors, fresh, metadata={_KEY: json.dumps(about)})
        fresh.replace(self.path / _FILE)

    def load(self, wanted: Mapping[str, torch.Tensor]) -> State | None:
        """What was saved, or None. ``wanted``: the tensors it must hold, by name, for their shapes.

        Raises UsageError when it belongs to a run with other arguments, or is damaged.
        """
        file = self.path / _FILE
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as stored:
                about = json.loads((stored.metadata() or {})[_KEY])
                if about["fingerprint"] != self.fingerprint:
                    raise UsageError(
                        f"{file}: belongs to a run with another student, teacher, text or option; repeat that run's "
                        "arguments, or leave --resume away to start anew."
                    )
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                checks = [Check(**check) for check in about["checks"]]
                state = State(int(about["step"]), int(about["best_step"]), checks, tensors)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file}: is damaged ({error}); leave --resume away to start anew.") from error
        fits = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if fits != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
            raise UsageError(f"{file}: is damaged (other tensors than expected); leave --resume away to start anew.")
        return state

    def remove(self) -> None:
        """Forget it; files of others in the folder stay."""
        for name in (_FILE, f"{_FILE}.new"):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()
