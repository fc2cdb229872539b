"""A model that amplifies rounding is judged by what float32 itself costs it; faults are still seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixt_export.targets import export
from mixt_export.verification import VerifyOptions, verify
from mixt_export.verification.gate import DtypeCost, rounding_gate
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def chaotic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose attention is nearly one-hot, so that rounding flips what it attends to; and its export."""
    folder = tmp_path_factory.mktemp("chaotic")
    model = write_tiny(folder / "model", num_hidden_layers=6)
    tensors = load_file(model / "model.safetensors")
    sharp = {name: 5 * value for name, value in tensors.items() if "q_proj" in name or "k_proj" in name}
    save_file(tensors | sharp, model / "model.safetensors")
    export(model, folder / "out", verify=False)
    return model, folder / "out"


def test_the_bar_moves_to_what_rounding_costs(chaotic: tuple[Path, Path]) -> None:
    model, out = chaotic
    report = verify(out, model, options=VerifyOptions(memory=False))
    assert report.passed and report.dtype_cost is not None and report.dtype_cost.dtype == "float64"
    assert report.tolerance == pytest.approx(3 * report.dtype_cost.rel_l2)
    assert report.minimum_tolerance is not None and report.minimum_tolerance > 1e-5
    assert not verify(out, model, options=VerifyOptions(memory=False, tolerance=1e-5, write=False)).passed


def test_a_fault_in_such_a_model_is_still_seen(chaotic: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = chaotic
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.4.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, ::-1].copy()
    broken = write_tiny(tmp_path / "broken", num_hidden_layers=6)
    save_file(tensors, broken / "model.safetensors")
    export(broken, tmp_path / "out", verify=False)
    report = verify(tmp_path / "out", model, options=VerifyOptions(memory=False))
    assert not report.passed and report.first_diverging_layer == "model.layers.4"


def test_a_model_that_does_not_amplify_keeps_the_usual_bar() -> None:
    def gate(error: float) -> float:
        return rounding_gate(DtypeCost("float64", 96, error, 1.0, 0.0, 0, 0, [error, np.inf])).tolerance

    assert gate(1e-6) == 1e-5
    assert gate(1e-4) == pytest.approx(3e-4)
    assert gate(np.inf) == 1e-5
