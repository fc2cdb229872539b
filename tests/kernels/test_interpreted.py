"""Every kind of kernel, few tokens and many, executed by Triton's interpreter, against dense matrices in float64."""

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
TOLERANCE = 1e-3
ROOT = Path(__file__).parent.parent.parent


def cases() -> list[Case]:
    """Modes that are no multiples of a tile, odd numbers of tokens, ranks below the padded one; few tokens and many."""
    kind, trains = "float16", []
    for rank, odd in ((12, True), (16, False), (25, True), (32, False)):
        for last in (24, 60) if odd else (40,):  # padded to 32, 64
            for first in (20, 70):  # j_1 in a narrow tile, in two wide ones
                name, modes = f"rank{rank}-{last}-{first}", ((3, last), (first, 5), (rank,))
                trains.append(train(name, *modes, kind, 66 if last == 24 else 17, bias=odd))
                if first == 20:
                    trains.append(train(f"{name}-few", *modes, kind, 8 - rank % 3, bias=not odd))
    return [
        *trains,
        train("four-aligned", (34, 20), (9, 7), (12,), kind, 70),
        train("four-aligned-few", (34, 20), (9, 7), (12,), kind, 3),
        mixture("pairs", (16, 32), 2, (2, 2), None, False, kind, 5, bias=True),
        mixture("branches", (16, 24), 2, (1, 1, 1), None, True, kind, 19),
        mixture("four", (16, 64), 2, (1, 1, 1, 1), None, False, kind, 17),
        mixture("padded", (16, 16), 2, (1, 1, 1), (48, 52), True, kind, 17),
        mixture("padded-right", (16, 32), 2, (1, 1), (24, 48), False, kind, 7, bias=True),
        mixture("uneven", (8, 40), 4, (1, 2), None, True, kind, 2),
        mixture("pairs-many", (16, 32), 2, (2, 2), None, False, kind, 33, bias=True),
        mixture("branches-many", (16, 24), 2, (1, 1, 1), None, True, kind, 70),
        mixture("four-many", (16, 64), 2, (1, 1, 1, 1), None, False, kind, 34),
        mixture("padded-many", (16, 16), 2, (1, 1, 1), (48, 52), True, kind, 40),
        mixture("padded-right-many", (16, 32), 2, (1, 1), (24, 48), False, kind, 45, bias=True),
        mixture("blocks-many", (24, 192), 2, (1, 1), None, True, kind, 33),
    ]


def kernel_of(case: Case) -> Any:
    """Small linears waste most of a tile, so whether a kernel would be chosen is not asked."""
    return case.linear.candidate() if isinstance(case.linear, tactics.Train) else case.linear.kernel()


CASES = {case.name: (case, kernel_of(case)) for case in cases()}


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
            "numbers": launch.numbers, "grid": launch.grid(len(case.x)),
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
    case, _ = CASES[name]
    expected = case.expected()
    error = np.linalg.norm(results[name] - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE


def test_every_tile_runs() -> None:
    """Each kernel of trains at few and at many tokens, and mixtures in both layouts at both, occur above."""
    ran = {(kernel.kind, len(case.x) > kernel.constant("FEW")) for case, kernel in CASES.values()}
    few = {kind for kind, many in ran if not many and kind.startswith("tt2")}
    many = {kind for kind, many in ran if many and kind.startswith("tt2")}
    kinds = {kernel.kind for kernel in tactics.train_kernels(False, 8)}
    assert many == kinds and {kind.rpartition("-j")[0] for kind in few} == {kind.rpartition("-j")[0] for kind in kinds}
    layouts = {("left" in kind, many) for kind, many in ran if kind.startswith("mixt")}
    assert layouts == {(left, many) for left in (True, False) for many in (True, False)}


def test_the_oracle_is_sensitive(results: dict[str, np.ndarray]) -> None:
    """One wrong number in one core is far beyond the tolerance."""
    case, _ = CASES["rank25-60-20-few"]
    wrong = case.dense.copy()
    wrong[3, 5] += 1.0
    expected = case.x.astype(np.float64) @ wrong
    assert np.linalg.norm(results["rank25-60-20-few"] - expected) / np.linalg.norm(expected) > 10 * TOLERANCE
