"""compress(method="tucker") from folder to folder on tiny models, and what the command line says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import CompressionReport, compress, plan
from mixt_export.errors import CheckpointError, ResourceError, UsageError
from mixt_export.network import densify
from mixt_export.reference import load_reference
from mixt_export.targets.dispatch import plan_export
from tests.compression.test_cli import mixt
from tests.tiny import write_tiny

torch.set_num_threads(1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "qwen2")


def make(model: Path, output: Path, **given: Any) -> CompressionReport:
    return compress(model, output, method="tucker", **given)


def dense_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    return {
        name: densify(linear, lambda tensor: checkpoint.store.read(tensor, "float32"))
        for name, linear in checkpoint.factors.items()
    }


@pytest.mark.parametrize("share", [True, False])
def test_a_model_runs_as_its_dense_equivalent(tmp_path: Path, model: Path, share: bool) -> None:
    """Logits of the factorised folder are those of the model with the rebuilt matrices in place of the weights."""
    report = make(model, tmp_path / "out", keep=0.6, blocks="last:2", tucker_share=share)
    assert report.keep_achieved == pytest.approx(0.6, abs=0.03)
    assert report.keep_achieved <= 0.6
    tokens = torch.arange(40).reshape(2, 20) * 7 % 256
    with torch.no_grad():
        factorised = load_reference(tmp_path / "out")(tokens).logits
        dense = load_reference(model)
        for name, matrix in dense_of(tmp_path / "out").items():
            dense.get_submodule(name).weight.copy_(torch.from_numpy(matrix))  # type: ignore[operator]
        rebuilt = dense(tokens).logits
    assert float((factorised - rebuilt).norm() / rebuilt.norm()) < 1e-5


def test_the_report_counts_what_is_stored(tmp_path: Path, model: Path) -> None:
    """Shared tensors once; errors are those of the stored matrices."""
    report = make(model, tmp_path / "out", keep=0.5, blocks="1")
    checkpoint = open_checkpoint(tmp_path / "out")
    cores = {ref.name: ref.size for linear in checkpoint.factors.values() for ref in linear.core_tensors()}
    assert report.linears_params_after == sum(cores.values())
    assert report.model_params_after == sum(stored.ref.size for stored in checkpoint.store.values())
    original = open_checkpoint(model)
    for layer in report.layers:
        weight = original.store.read(f"{layer.name}.weight", "float32").astype(np.float64)
        rebuilt = dense_of(tmp_path / "out")[layer.name]
        error = float(((weight - rebuilt) ** 2).sum() / (weight**2).sum())
        assert layer.output_error == pytest.approx(error, rel=1e-4)
        assert layer.method == "tucker"
    assert {layer.ranks for layer in report.layers if "self_attn" in layer.name} == {report.layers[0].ranks}


def test_given_ranks_are_taken(tmp_path: Path, model: Path) -> None:
    report = make(
        model,
        tmp_path / "out",
        blocks="0",
        exclude=["down"],
        tucker_ranks=["12,8,3", "gate-up=20,31"],
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    shapes = {name.removeprefix("model.layers.0."): stored.ref.shape for name, stored in checkpoint.store.items()}
    assert shapes["self_attn.tucker.u1"] == (48, 12)
    assert shapes["self_attn.tucker.core"] == (12, 2, 8, 3)
    assert shapes["self_attn.tucker.u3.q"] == (2, 3)
    assert shapes["mlp.tucker.u1"] == (48, 20)
    assert shapes["mlp.up_proj.core"] == (20, 31)
    assert report.recipe["tucker_ranks"] == {"heads": [12, 8, 3], "gate-up": [20, 31]}


def test_full_ranks_change_nothing(tmp_path: Path, model: Path) -> None:
    report = make(model, tmp_path / "out", keep=1.0, blocks="0")
    assert {layer.method for layer in report.layers} == {"dense"}
    assert report.keep_achieved == 1.0


def test_equal_runs_give_equal_files(tmp_path: Path, model: Path) -> None:
    for name in "ab":
        make(model, tmp_path / name, keep=0.5, blocks="2")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_dry_run_knows_the_budget(tmp_path: Path, model: Path) -> None:
    found = plan(model, tmp_path / "out", method="tucker", include=["self_attn"], tucker_ranks=(12, 8, 3))
    attention = 2 * 12 * 8 * 3 + 48 * 12 + 16 * 8 + 6 * 3
    assert found.budget == 3 * attention
    assert found.calibration == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tucker-ranks", "500,4,2", "--include", "self_attn"], "above its maximum"),
        (["--tucker-ranks", "many"], "give R1,R2,R3"),
        (["--tucker-ranks", "gate-up=9,9", "--include", "self_attn"], "is of kind gate-up, only heads"),
        (["--keep", "0"], "is not a share"),
        (["--keep", "0.001"], "at least"),
        (["--bond", "3"], "does not apply to method tucker"),
        (["--hooi-sweeps", "-1"], "at least 0"),
    ],
)
def test_mistakes_end_in_one_sentence_and_code_2(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert mixt(model, "-o", tmp_path / "out", "--method", "tucker", *arguments) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_run_prints_the_cores(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixt(model, "-o", tmp_path / "out", "--method", "tucker", "--keep", "0.5") == 0
    shown = capsys.readouterr().out
    assert "core" in shown
    assert "kept 0.49" in shown or "kept 0.50" in shown


def test_ranks_of_a_kind_that_is_not_there(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="is of kind single"):
        make(model, tmp_path / "out", include=["self_attn"], tucker_ranks=["single=3"])


def test_the_smallest_memory_budget_named_is_one_that_is_met_and_no_larger_than_the_default_plan(
    tmp_path: Path, model: Path
) -> None:
    """Forms that are least for each linear alone hold more than those that read what their neighbours read too."""
    make(model, tmp_path / "out", keep=0.5)
    default = plan_export(tmp_path / "out", variants="none").weight_bytes
    with pytest.raises(ResourceError, match="--memory-budget: the weights need at least") as caught:
        plan_export(tmp_path / "out", memory_budget=1000)
    found = re.search(r"at least ([0-9.,]+) MB", str(caught.value))
    assert found is not None
    least = round(float(found[1].replace(",", "")) * 1e6)
    assert least <= default + 1000
    assert plan_export(tmp_path / "out", memory_budget=least, variants="none").weight_bytes <= least


@pytest.mark.parametrize("method", ["tucker", "svd"])
def test_a_weight_that_is_no_matrix_is_one_sentence(tmp_path: Path, model: Path, method: str) -> None:
    path = model / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][0].copy()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight' has shape \(48,\), expected a matrix"):
        compress(model, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()
