"""Random perturbations of random factors: caught whenever they are larger than what docs/verify.md says is seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.verification.faults.attempt import judged
from tests.verification.faults.cases import LAYER, small_case
from tests.verification.faults.conftest import QUICK
from tests.verification.faults.exported import Exported

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Relative size of noise on one factor that is always seen.
SEEN = {"low-rank ort": 1e-3, "low-rank ort fp16": 1e-1}


@pytest.mark.parametrize("case", SEEN)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    linear=st.sampled_from(LINEARS),
    core=st.integers(0, 1),
    above=st.floats(1.0, 30.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_noise_above_the_limit_is_caught(
    case: str, linear: str, core: int, above: float, seed: int, root: Path, tmp_path: Path
) -> None:
    model, clean = small_case(case, root)
    folder = tmp_path / "noisy"
    shutil.rmtree(folder, ignore_errors=True)
    x = Exported(clean, folder)
    name = x.weights(LAYER, linear)[core]
    value = x.value(name).astype(np.float64)
    noise = np.random.default_rng(seed).standard_normal(value.shape)
    size = min(above * SEEN[case], 1.0)
    x.put(name, value + size * noise * np.linalg.norm(value) / np.linalg.norm(noise))
    found = judged(x.save(), model, QUICK)
    assert found.caught
    assert found.where == f"model.layers.{LAYER}", found
    assert "files" not in found.caught_by
