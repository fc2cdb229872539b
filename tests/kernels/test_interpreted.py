"""Every kind of kernel, executed by Triton's interpreter, against dense matrices in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kernels.linears import Case, mixture, tactics, train

#: Relative L2 error: rounding of inputs is in the expectation, what is left is that of partial results and of sums.
TOLERANCE = {"float16": 1e-3, "float32": 1e-6}
ROOT = Path(__file__).parent.parent.parent


def cases() -> list[Case]:
    """Modes that are no multiples of a tile, odd numbers of tokens, ranks below the padded one, both dtypes."""
    found = []
    for dtype in TOLERANCE:
        found += [
            train(f"tt2-{dtype}", (10, 24), (12, 20), (8,), dtype, 3),
            train(f"tt2-rank32-{dtype}", (6, 40), (20, 9), (24,), dtype, 3, bias=True),
            train(f"tt2-rank64-{dtype}", (5, 16), (33, 6), (40,), dtype, 1),
            train(f"tt3-{dtype}", (2, 5, 16), (5, 6 if dtype == "float16" else 2, 10), (8, 16), dtype, 3, bias=True),
            mixture(f"pairs-{dtype}", (16, 32), 2, (2, 2), None, False, dtype, 5, bias=True),
            mixture(f"branches-{dtype}", (16, 24), 2, (1, 1, 1), None, True, dtype, 19),
            mixture(f"four-{dtype}", (16, 64), 2, (1, 1, 1, 1), None, False, dtype, 17),
            mixture(f"padded-{dtype}", (16, 16), 2, (1, 1, 1), (48, 52), True, dtype, 17),
            mixture(f"padded-right-{dtype}", (16, 32), 2, (1, 1), (24, 48), False, dtype, 7, bias=True),
            mixture(f"uneven-{dtype}", (8, 40), 4, (1, 2), None, True, dtype, 2),
        ]  # fmt: skip
    found.append(train("tt3-rank32-float16", (2, 5, 8), (4, 3, 8), (24, 9), "float16", 2))
    return [*found, train("tt4-float16", (2, 2, 3, 8), (7, 2, 3, 6), (8, 16, 8), "float16", 2, bias=True)]


def candidates(case: Case) -> list[Any]:
    """Small linears waste most of a tile, so what would be chosen is not asked."""
    return case.linear.candidates() if case.name.startswith("tt") else case.linear.kernels()


CASES = {f"{case.name}/{kernel.tactic}": (case, kernel) for case in cases() for kernel in candidates(case)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """y of every case, computed by one process."""
    folder = tmp_path_factory.mktemp("kernels")
    arrays: dict[str, Any] = {}
    requests = []
    for name, (case, kernel) in CASES.items():
        launch = case.linear.launch(kernel)
        inputs = {"x": case.x} | {f"w{k}": w for k, w in enumerate(case.matrices)}
        inputs |= {} if case.bias is None else {"bias": case.bias}
        arrays |= {f"{name}:{key}": array for key, array in inputs.items()}
        requests.append({
            "name": name, "kernel": asdict(kernel), "absent": kernel.absent,
            "inputs": [f"{name}:{key}" for key in inputs],
            "numbers": launch.numbers, "grid": [-(-len(case.x) // launch.tokens), launch.y, launch.z],
            "out_features": case.dense.shape[1],
        })  # fmt: skip
    np.savez(folder / "requests.npz", cases=json.dumps(requests), **arrays)
    command = [
        sys.executable,
        "-m",
        "tests.kernels.interpret",
        str(folder / "requests.npz"),
        str(folder / "results.npz"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    with np.load(folder / "results.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_the_linear(results: dict[str, np.ndarray], name: str) -> None:
    case, kernel = CASES[name]
    expected = case.expected()
    error = np.linalg.norm(results[name] - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[kernel.dtype]


def test_every_tile_runs() -> None:
    """Each tactic of each kind of train, and both of mixtures in both layouts, occur above."""
    ran = {kernel.name.replace("-bias", "").replace("-odd", "") for _, kernel in CASES.values()}
    for dtype, aligns in tactics.ALIGNMENTS.items():
        assert {kernel.name for kernel in tactics.train_kernels(dtype, False, aligns[0])} <= ran
    layouts = {("left" in name, name[-1]) for name in ran if name.startswith("mixt")}
    assert layouts == {(left, tactic) for left in (True, False) for tactic in "12"}


def test_the_oracle_is_sensitive(results: dict[str, np.ndarray]) -> None:
    """One wrong number in one core is far beyond the tolerance."""
    case, kernel = CASES["tt3-float32/1"]
    wrong = case.dense.copy()
    wrong[3, 5] += 0.1
    expected = case.x.astype(np.float64) @ wrong + case.bias
    assert np.linalg.norm(results["tt3-float32/1"] - expected) / np.linalg.norm(expected) > 10 * TOLERANCE[kernel.dtype]
