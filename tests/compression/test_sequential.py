"""Factors that depend on X', the update and the sentences of the low rank methods, from folder to folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import CompressionReport, Settings, compress
from mixt_export.compression.texts import calibration_windows
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.reference import load_reference
from tests.tiny import write_tiny

SETTINGS = Settings(windows=6, window=32, fisher_windows=3, batch=2, anchor_damping=1e-4, input_damping=1e-6)


def run(model: Path, output: Path, text: Path, **options: Any) -> CompressionReport:
    return compress(
        model,
        output,
        **{"calib": [text], "settings": SETTINGS, "ranks": "uniform", "evaluate": False, "cache": False, **options},
    )


def inputs(folder: Path, model: Path, text: Path, names: list[str]) -> dict[str, np.ndarray]:
    """What each linear reads on the calibration windows when the whole model runs: (tokens, in) float64."""
    windows, _ = calibration_windows(model, [text], SETTINGS.windows, SETTINGS.window, 300)
    found: dict[str, np.ndarray] = {}
    reference = load_reference(folder)
    for name in names:
        reference.get_submodule(name).register_forward_hook(
            lambda _m, x, _y, name=name: found.update({name: x[0].double().numpy().reshape(-1, x[0].shape[-1])})
        )
    with torch.no_grad():
        reference(torch.from_numpy(windows))
    return found


def written_errors(model: Path, output: Path, text: Path, report: CompressionReport) -> dict[str, float]:
    """||W x - W' x'||² / ||W x||² of every linear, from whole forward passes of the source and of what was written."""
    names = [layer.name for layer in report.layers]
    before, after = (inputs(folder, model, text, names) for folder in (model, output))
    dense, made = open_checkpoint(model), load_reference(output)
    errors = {}
    for name in names:
        wanted = before[name] @ dense.store.read(f"{name}.weight", "float64").T
        linear: Any = made.get_submodule(name)
        with torch.no_grad():
            given = linear(torch.from_numpy(after[name]).float()).double().numpy()
        if linear.bias is not None:
            given = given - linear.bias.detach().double().numpy()
        errors[name] = float(((wanted - given) ** 2).sum() / (wanted**2).sum())
    return errors


@pytest.mark.parametrize(
    "options",
    [
        {"method": "aa-svd", "objective": "anchored"},
        {"method": "aa-svd", "objective": "shift-aware"},
        {"method": "svd-llm", "update": "shift-aware"},
        {"method": "asvd", "update": "anchored"},
        {"method": "aa-svd", "objective": "anchored", "blocks": "1"},
    ],
)
def test_what_is_reported_of_both_streams_is_what_whole_models_do(
    tmp_path: Path, model: Path, text: Path, options: dict[str, Any]
) -> None:
    report = run(model, tmp_path / "out", text, keep=0.6, **options)
    found = written_errors(model, tmp_path / "out", text, report)
    for layer in report.layers:
        assert layer.output_error == pytest.approx(found[layer.name], rel=1e-3, abs=1e-6)


def test_the_update_lowers_errors_and_the_anchored_optimum_is_below_it(tmp_path: Path, model: Path, text: Path) -> None:
    errors = {}
    for name, options in {
        "plain": {"method": "svd-llm"},
        "updated": {"method": "svd-llm", "update": "anchored"},
        "optimum": {"method": "aa-svd", "objective": "anchored"},
    }.items():
        report = run(model, tmp_path / name, text, keep=0.5, **options)
        errors[name] = sum(written_errors(model, tmp_path / name, text, report).values())
    assert errors["optimum"] < errors["updated"] < errors["plain"]


def test_half_precision_streams_see_what_is_stored(tmp_path: Path, text: Path) -> None:
    model = write_tiny(tmp_path / "half", "llama", dtype="bfloat16")
    report = run(model, tmp_path / "out", text, method="aa-svd", keep=0.6)
    found = written_errors(model, tmp_path / "out", text, report)
    for layer in report.layers:
        assert layer.output_error == pytest.approx(found[layer.name], rel=0.1, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "svd", "asvd_alpha": 0.3}, "asvd-alpha does not apply to method svd"),
        ({"method": "asvd", "asvd_alpha": -1.0}, "from 0"),
        ({"method": "asvd", "asvd_alpha": float("nan")}, "from 0"),
        ({"method": "svd-llm", "refine_steps": -1}, "refine-steps -1"),
        ({"method": "svd-llm", "update": "yes"}, "shift-aware or anchored"),
        ({"method": "aa-svd", "update": "anchored"}, "already; use --update with"),
    ],
)
def test_bad_options_get_one_sentence(
    tmp_path: Path, model: Path, text: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run(model, tmp_path / "out", text, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_few_tokens_are_damped_and_told_of(tmp_path: Path, model: Path, text: Path) -> None:
    few = replace(SETTINGS, windows=2)
    for method in ("svd", "aa-svd"):
        report = run(model, tmp_path / method, text, method=method, settings=few, keep=0.6)
        assert len(report.notes) == (method != "svd")
        assert all("64 calibration tokens for linears of 104 input features" in note for note in report.notes)
    assert not run(model, tmp_path / "many", text, method="svd-llm").notes


@pytest.mark.parametrize("method", ["asvd", "aa-svd", "gfw-svd"])
def test_a_model_that_overflows_is_refused(tmp_path: Path, text: Path, method: str) -> None:
    """Activations beyond float32's range: the statistics of the linear that reads them are named, exit code 2."""
    model = write_tiny(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    for name in ("gate", "up"):
        weights[f"model.layers.1.mlp.{name}_proj.weight"] *= np.float32(1e22)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    words = r"layers\.\d\.[a-z_.]+: calibration statistics of \d+ features are not finite"
    with pytest.raises(CheckpointError, match=words) as caught:
        run(model, tmp_path / "out", text, method=method)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
