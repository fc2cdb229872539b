"""compress(method="tt") from folder to folder on tiny models, judged by whole models run in PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import CompressionReport, compress, plan
from mixt_export.errors import UsageError
from mixt_export.network import densify
from mixt_export.reference import load_reference
from tests.compression.test_cli import mixt
from tests.compression.test_mixt_job import SETTINGS, activations, model, rewritten, text

__all__ = ["model", "text"]  # fixtures


def make(model: Path, output: Path, text: Path, **given: Any) -> CompressionReport:
    settings = replace(SETTINGS, als_sweeps=2, als_steps=4)
    arguments: dict[str, Any] = {"method": "tt", "calib": [text], "settings": settings, "blocks": "last:2"}
    return compress(model, output, **{**arguments, "refine_steps": 0, "controls": False, **given})


def dense_of(folder: Path, out: Path, model: Path) -> Path:
    """``model`` with the matrices of the factorised linears of ``out`` and its vectors."""
    checkpoint = open_checkpoint(out)
    change = {
        f"{name}.weight": densify(linear, checkpoint.store.read).astype(np.float32)
        for name, linear in checkpoint.factors.items()
    }
    vectors = {
        name: checkpoint.store.read(name) for name in checkpoint.store if name.endswith(("norm.weight", ".bias"))
    }
    return rewritten(folder, model, change | vectors)


def test_a_folder_that_loads_and_equals_its_dense_matrices(tmp_path: Path, model: Path, text: Path) -> None:
    """Trains of several shapes with outliers, refined: every linear as its float64 matrix gives the same logits."""
    report = make(
        model,
        tmp_path / "out",
        text,
        modes=["prime", "up=4x12:8x13", "k_proj|v_proj=balanced"],
        cores=3,
        tt_rank=["q_proj=5"],
        keep=0.5,
        outliers=0.01,
        refine_steps=4,
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len(report.layers) == len(checkpoint.factors) == 14
    ranks = {layer.name.rpartition(".")[2]: layer.ranks for layer in report.layers}
    assert ranks["q_proj"] == (5, 5)
    assert len(ranks["up_proj"] or ()) == 1
    for layer in report.layers:
        linear = checkpoint.factors[layer.name]
        assert linear.sparse is not None
        assert linear.sparse.nnz == round(0.01 * layer.out_features * layer.in_features)
        assert layer.params == sum(ref.size for ref in linear.core_tensors()) + linear.sparse.nnz
    dense = dense_of(tmp_path / "dense", tmp_path / "out", model)
    tokens = torch.arange(60).reshape(2, 30) * 7 % 256
    with torch.no_grad():
        found, expected = (load_reference(path)(tokens).logits for path in (tmp_path / "out", dense))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_keep_is_met(tmp_path: Path, model: Path, text: Path, outliers: float) -> None:
    """What whole ranks leave of a linear's budget goes to the next; the last one alone can leave something."""
    for keep in (0.35, 0.7):
        report = make(model, tmp_path / f"{keep}", text, keep=keep, cores=2, outliers=outliers)
        assert keep - 0.005 < report.keep_achieved <= keep
        budget = plan(model, tmp_path / "never", method="tt", keep=keep, cores=2, calib=[text], blocks="last:2").budget
        assert report.linears_params_after <= budget + len(report.layers)


def test_calibration_serves_the_inputs(tmp_path: Path, model: Path, text: Path) -> None:
    """The output error of the first replaced linears is that of the whole model, and lower than without inputs."""
    names = [f"model.layers.2.self_attn.{name}_proj" for name in "qkv"]
    errors = {}
    for objective in ("input-agnostic", "anchored"):
        out = tmp_path / objective
        report = make(model, out, text, objective=objective, blocks="2", include=["[qkv]_proj"], keep=0.3)
        errors[objective] = {layer.name: layer.output_error for layer in report.layers}
        assert list(errors[objective]) == names
    assert all(errors["anchored"][name] < 0.9 * errors["input-agnostic"][name] for name in names)


def test_reported_error_is_the_models(tmp_path: Path, model: Path, text: Path) -> None:
    from mixt_export.compression.job import Job
    from mixt_export.compression.request import Request
    from mixt_export.progress import SILENT

    options: dict[str, Any] = {"method": "tt", "calib": [text], "settings": SETTINGS, "blocks": "2"}
    report = make(model, tmp_path / "out", text, blocks="2", include=["q_proj"], keep=0.4)
    request = Request.of(model, tmp_path / "never", {**options, "refine_steps": 0, "controls": False})
    job: Job = request.family.load_job()(request)
    windows, _ = job.windows(SILENT)
    name = "model.layers.2.self_attn.q_proj"
    x = activations(model, [name], windows)[name]
    weight = open_checkpoint(model).store.read(f"{name}.weight").astype(np.float64)
    checkpoint = open_checkpoint(tmp_path / "out")
    wanted, found = x @ weight.T, x @ densify(checkpoint.factors[name], checkpoint.store.read).T
    expected = (((wanted - found) ** 2).sum(1) / (wanted**2).sum(1)).mean()
    assert report.layers[0].output_error == pytest.approx(expected, rel=1e-3)


def test_recovery_goes_on_from_it(tmp_path: Path, model: Path, text: Path) -> None:
    from mixt_export.compression.recover import recover
    from mixt_export.compression.recover.settings import RecoverSettings

    make(model, tmp_path / "out", text, keep=0.4, outliers=0.01)
    before = open_checkpoint(tmp_path / "out")
    settings = RecoverSettings(steps=12, window=24, windows=8, common=64, others=32, learning_rate=1e-3)
    recover(tmp_path / "out", model, tmp_path / "better", texts=[text], eval_texts=[], settings=settings)
    after = open_checkpoint(tmp_path / "better")
    linear = after.factors["model.layers.1.mlp.up_proj"]
    assert linear == before.factors["model.layers.1.mlp.up_proj"]
    trained = [ref.name for ref in linear.core_tensors()] + [linear.sparse.values.name]  # type: ignore[union-attr]
    assert all(not np.array_equal(before.store.read(name), after.store.read(name)) for name in trained)
    for side in (linear.sparse.rows, linear.sparse.cols):  # type: ignore[union-attr]
        np.testing.assert_array_equal(before.store.read(side.name), after.store.read(side.name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["6x8:6x9"]}, "multiply up to 54"),
        ({"cores": 2, "tt_rank": 49, "include": ["q_proj"]}, r"bonds of at most 48; give less"),
        (
            {"cores": 2, "tt_rank": ["20", "q_proj=37"]},
            "would have 4144 numbers, the dense matrix has 3072; 27 at most",
        ),
        ({"tt_rank": ["3"], "keep": 0.5}, "leave one out"),
        ({"keep": 1.5}, "not a share"),
        ({"keep": 0.01, "outliers": 0.2}, "keep more or store fewer outliers"),
        ({"outliers": 0.7}, "from 0 to below 0.5"),
        ({"objective": "shift-aware"}, "has no objective 'shift-aware'"),
        ({"n_tensors": 4}, "--n-tensors does not apply to method tt"),
    ],
)
def test_bad_options(tmp_path: Path, model: Path, text: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(model, tmp_path / "out", text, **options)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path, model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "tt", "--calib", text, "--blocks", "2", "--windows", 4, "--window", 32]
    arguments += ["--refine-steps", 0, "--no-controls"]
    wanted = ["--modes", "prime", "--cores", 4, "--tt-rank", 3, "--tt-rank", "mlp=4", "--outliers", 0.01]
    assert mixt(model, "-o", tmp_path / "out", *arguments, *wanted) == 0
    report = json.loads((tmp_path / "out" / "compress_report.json").read_text())
    assert report["recipe"]["modes"] == ["prime"]
    assert {tuple(layer["ranks"]) for layer in report["layers"] if "mlp" in layer["name"]} == {(4, 4, 4)}
    capsys.readouterr()
    assert mixt(model, "-o", tmp_path / "bad", *arguments, "--modes", "5x5:5x5") == 2
    assert "multiply up to 25" in capsys.readouterr().err
