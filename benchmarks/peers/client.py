"""The parent's side of a worker: start it, send it commands, end it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.contenders import Contender

_ROOT = Path(__file__).parent.parent.parent


class WorkerError(RuntimeError):
    """A worker ended; the text is what it last said."""


class Worker:
    """A process that holds ``contender`` loaded with ``threads`` threads; ``loaded`` is what loading cost."""

    def __init__(self, python: Path, contender: Contender, threads: int) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        command = [python, "-m", "benchmarks.peers.worker", contender.engine, contender.path, str(threads)]
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=variables,
        )
        self.loaded = self._answer()

    def __call__(self, what: str, **given: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **given}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._said.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            raise WorkerError((self._said.read().strip().splitlines() or ["it ended without a word"])[-1][:300])
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def working(python: Path, contender: Contender, threads: int) -> Iterator[Worker]:
    """A worker for a while. Raises WorkerError."""
    worker = Worker(python, contender, threads)
    try:
        yield worker
    finally:
        worker.close()
