"""SIGKILL at random moments of export, compress and build: the output must be absent or whole, leftovers removed.

python -m benchmarks.killed [--moments 12]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import publish
from tests.killing import digests, engine_is_whole, killed, leftovers, write_plan
from tests.tiny import write_tiny


@dataclass(frozen=True)
class Work:
    """``run`` writes ``output``; ``whole`` says whether what lies there is complete; ``parent`` may hold leftovers."""

    run: Callable[[], Any]
    output: Path
    parent: Path
    whole: Callable[[], bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in WORKS.items():
            folder = Path(scratch) / name
            folder.mkdir()
            rows[name] = _kill(make(folder), given.moments, np.random.default_rng(given.seed))
    broken = sum(row["broken"] + row["left behind"] for row in rows.values())
    publish("killed", {"seed": given.seed, "works": rows, "broken outputs": broken})
    raise SystemExit(1 if broken else 0)


def _kill(work: Work, moments: int, rng: np.random.Generator) -> dict[str, int]:
    began = time.perf_counter()
    work.run()
    seconds = time.perf_counter() - began
    found = {"moments": moments, "finished first": 0, "absent": 0, "whole": 0, "broken": 0, "left behind": 0}
    for _ in range(moments):
        shutil.rmtree(work.output)
        found["finished first"] += killed(work.run, float(rng.uniform(0, seconds)))
        state = "absent" if not work.output.exists() else "whole" if work.whole() else "broken"
        found[state] += 1
        shutil.rmtree(work.output, ignore_errors=True)
        work.run()
        found["left behind"] += bool(leftovers(work.parent)) or not work.whole()
    return found


def _export(folder: Path) -> Work:
    from mixt_export.targets import export

    model, output = write_tiny(folder / "model"), folder / "out"
    export(model, folder / "reference", verify=False)
    expected = digests(folder / "reference")
    return Work(lambda: export(model, output, verify=False), output, folder, lambda: _same(output, expected))


def _compress(folder: Path) -> Work:
    from mixt_export import compress

    model, output = write_tiny(folder / "model"), folder / "out"
    compress(model, folder / "reference", method="svd", keep=0.5)
    expected = digests(folder / "reference")
    return Work(
        lambda: compress(model, output, method="svd", keep=0.5), output, folder, lambda: _same(output, expected)
    )


def _build(folder: Path) -> Work:
    from mixt_export.targets import export
    from mixt_export.targets.trt import TrtOptions

    exported = folder / "out"
    options = TrtOptions(jetpack=6, max_input_len=16)
    export(write_tiny(folder / "model"), exported, target="trt", max_seq_len=64, trt=options, verify=False)
    plan = np.random.default_rng(0).bytes(20_000_000)
    engine = write_plan(exported, plan)
    return Work(lambda: write_plan(exported, plan), engine, engine.parent, lambda: engine_is_whole(engine))


def _same(folder: Path, expected: dict[str, str]) -> bool:
    """The same files; weights and graphs byte for byte (reports hold times and paths)."""
    found = digests(folder)
    binary = {name for name in expected if Path(name).suffix in (".onnx", ".data", ".safetensors")}
    return set(found) == set(expected) and all(found[name] == expected[name] for name in binary)


WORKS: dict[str, Callable[[Path], Work]] = {"export": _export, "compress": _compress, "storing an engine": _build}

if __name__ == "__main__":
    main()
