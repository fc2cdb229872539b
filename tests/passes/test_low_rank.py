"""Dense weights of small rank are found and factored as exactly as float32 computes; the dense model is the judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from mixt_export import compress, network
from mixt_export.checkpoints import open_checkpoint, write_checkpoint
from mixt_export.cli.inspect import app
from mixt_export.compression.settings import Settings
from mixt_export.errors import MixtError, UnsupportedError, UsageError
from mixt_export.passes import DetectLowRank, PassResult, run
from mixt_export.passes.low_rank import examine, examined
from mixt_export.targets import export
from mixt_export.targets.rewriting import Rewriting
from mixt_export.verification.graph import open_graph
from mixt_export.verification.session import ExportedRunner
from mixt_export.verification.torch_model import TorchModel
from tests.tiny import write_tiny
from tests.tiny_encoder import write_tiny_encoder

DOWN, Q, GATE = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"
RANKS = {DOWN: 3, Q: 11, GATE: 1}


def laser_like(folder: Path, ranks: dict[str, int] | None = None, **options: Any) -> Path:
    """A dense tiny folder, some of whose matrices were truncated to ``ranks`` and rounded to the stored dtype again."""
    write_tiny(folder, **options)
    tensors = load_file(folder / "model.safetensors")
    for name, rank in (RANKS if ranks is None else ranks).items():
        stored = tensors[f"{name}.weight"]
        left, values, right = np.linalg.svd(stored.astype(np.float64), full_matrices=False)
        tensors[f"{name}.weight"] = ((left[:, :rank] * values[:rank]) @ right[:rank]).astype(stored.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def detected(folder: Path, tolerance: float = 1e-5) -> PassResult:
    (folder / "factors").mkdir(exist_ok=True)
    return run(DetectLowRank(tolerance, folder / "factors"), open_checkpoint(folder))


def test_exactly_the_truncated_matrices_are_found(tmp_path: Path) -> None:
    folder = laser_like(tmp_path / "model")
    found = detected(folder)
    source = open_checkpoint(folder)
    assert {name: entry["rank"] for name, entry in found.record["linears"].items()} == RANKS
    assert set(found.checkpoint.factors) == set(RANKS)
    for name, linear in found.checkpoint.factors.items():
        assert f"{name}.weight" not in found.checkpoint.store
        expected = source.store.read(f"{name}.weight", "float64")
        error = np.linalg.norm(network.densify(linear, found.checkpoint.store.read) - expected)
        assert error <= 2.0**-23 * np.linalg.norm(expected)
        assert found.record["linears"][name]["error"] == pytest.approx(error / np.linalg.norm(expected), rel=1e-6)


@pytest.mark.parametrize("shape", [(48, 104), (104, 48), (64, 64), (17, 200), (1, 9), (2, 2)])
def test_ranks_around_the_largest_that_pays(shape: tuple[int, int]) -> None:
    """r (m + n) < m n decides: one more is not factored, whatever the tolerance finds."""
    rng = np.random.default_rng(0)
    paying = (shape[0] * shape[1] - 1) // sum(shape)
    for rank in {1, 2, paying - 1, paying, paying + 1, min(shape)}:
        if not 1 <= rank <= min(shape):
            continue
        matrix = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
        found, pair = examined("net", matrix, 1e-6)
        assert found.paying == paying
        if rank > paying:
            assert found.rank is None
            assert pair is None
        else:
            assert found.rank == rank
            assert found.lossless
            assert pair is not None
            assert pair[0].shape == (shape[0], rank)
            assert pair[1].shape == (rank, shape[1])
            assert rank * sum(shape) < shape[0] * shape[1]


@pytest.mark.parametrize("spectrum", ["steep", "flat", "one outlier"])
def test_the_rank_is_that_of_a_full_decomposition(spectrum: str) -> None:
    """Against numpy's singular values, on matrices without a gap; full-rank ones are told by the range finder."""
    rng = np.random.default_rng(3)
    size = 60
    values = {
        "steep": np.exp2(-1.5 * np.arange(size)), "flat": np.ones(size), "one outlier": np.r_[1e6, np.ones(size - 1)],
    }[spectrum]  # fmt: skip
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2))
    matrix = (left * values) @ right
    for tolerance in (1e-2, 1e-4, 3e-7):
        true = int((np.linalg.svd(matrix, compute_uv=False) > tolerance * values[0]).sum())
        found, _ = examined("net", matrix, tolerance)
        assert found.rank == (true if true <= found.paying else None)


def test_a_large_tolerance_loses_nothing() -> None:
    """What a tolerance of 10 % cuts off is more than float32 rounding: a rank is reported, nothing is factored."""
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((50, 50)))[0] for _ in range(2))
    matrix = (left * np.r_[np.ones(5), np.full(45, 0.01)]) @ right
    found, _ = examined("net", matrix, 0.1)
    assert found.rank == 5
    assert not found.lossless
    assert found.error == pytest.approx(np.sqrt(45 * 1e-4 / (5 + 45 * 1e-4)), rel=0.05)


def test_zero_matrices_and_16_bit_folders_stay_dense(tmp_path: Path) -> None:
    assert examined("net", np.zeros((40, 50)), 1e-6)[0].rank is None
    found = detected(laser_like(tmp_path / "model", dtype="bfloat16"), 1e-6)
    assert not found.changed
    assert found.record == {"tolerance": 1e-6, "linears": {}}


def test_conv1d_layout_and_biases(tmp_path: Path) -> None:
    """GPT-2 stores (in, out) and has biases: the factors keep both."""
    name = "transformer.h.0.mlp.c_fc"
    folder = laser_like(tmp_path / "model", {name: 4}, model_type="gpt2")
    found = detected(folder)
    linear, source = found.checkpoint.factors[name], open_checkpoint(folder)
    assert linear.bias is not None
    assert linear.bias.name == f"{name}.bias"
    expected = source.store.read(f"{name}.weight", "float64").T
    np.testing.assert_allclose(network.densify(linear, found.checkpoint.store.read), expected, atol=1e-5)
    assert difference(tmp_path, folder) <= 1e-5


def test_the_export_computes_what_the_dense_model_computes(tmp_path: Path) -> None:
    folder = laser_like(tmp_path / "model")
    assert difference(tmp_path, folder) <= 1e-5


def difference(tmp_path: Path, folder: Path) -> float:
    """Relative L2 of the export's logits, with detection, to PyTorch on the dense folder; factors left no trace."""
    result = export(folder, tmp_path / "out", verify=False, rewriting=Rewriting(detect_low_rank=1e-5))
    assert result.manifest["passes"]["detect_low_rank"]["linears"]
    assert not [path.name for path in tmp_path.iterdir() if ".factors-" in path.name]
    tokens = np.arange(24, dtype=np.int64)
    runner = ExportedRunner(open_graph(tmp_path / "out"), 1, all_positions=True, layers=False)
    found, expected = np.asarray(runner.full(tokens).logits[0]), TorchModel(folder, threads=1).logits(tokens)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_laser_model_published_dense_gets_its_factors_back(tmp_path: Path) -> None:
    """What `compress --method laser` truncated, multiplied out as its authors publish it, is found rank by rank."""
    base = write_tiny(tmp_path / "base", num_hidden_layers=1)
    settings = Settings(windows=4, window=16)
    compress(base, tmp_path / "laser", method="laser", rho=[0.1], search=False, blocks="all", settings=settings)
    laser = open_checkpoint(tmp_path / "laser")
    tensors = load_file(base / "model.safetensors")
    for name, linear in laser.factors.items():
        tensors[f"{name}.weight"] = network.densify(linear, laser.store.read).astype(np.float32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    found = detected(base)
    ranks = {name: linear.core_tensors()[0].shape[1] for name, linear in laser.factors.items()}
    assert {name: entry["rank"] for name, entry in found.record["linears"].items()} == ranks
    assert ranks


def test_factors_are_written_like_any_others(tmp_path: Path) -> None:
    """The result is a checkpoint: written as a folder it is smaller and reads back the same."""
    folder = laser_like(tmp_path / "model")
    found = detected(folder).checkpoint
    (tmp_path / "written").mkdir()
    write_checkpoint(tmp_path / "written", found, [], found.factors, {})
    back = open_checkpoint(tmp_path / "written")
    assert back.factors == found.factors
    assert back.store.nbytes < open_checkpoint(folder).store.nbytes


def test_encoders_bad_tolerances_and_wrong_results_are_refused(tmp_path: Path) -> None:
    encoder = open_checkpoint(write_tiny_encoder(tmp_path / "encoder"))
    with pytest.raises(UnsupportedError):
        run(DetectLowRank(1e-6, tmp_path), encoder)
    with pytest.raises(UnsupportedError, match="--detect-low-rank: knows decoders only"):
        export(tmp_path / "encoder", tmp_path / "out", rewriting=Rewriting(detect_low_rank=1e-6))
    source = open_checkpoint(laser_like(tmp_path / "model"))
    with pytest.raises(UsageError, match="between 0 and 1"):
        run(DetectLowRank(1.5, tmp_path), source)
    rewriting = DetectLowRank(1e-5, tmp_path)
    result = rewriting.call(source)
    low = result.checkpoint.factors[Q]
    broken = PassResult(
        result.checkpoint, True, {"linears": {GATE: result.record["linears"][GATE], Q: {"rank": low.params}}}
    )
    rewriting.ensures(source, broken)
    swapped = {**result.checkpoint.factors, Q: result.checkpoint.factors[GATE]}
    with pytest.raises(MixtError, match="do not replace"):
        rewriting.ensures(source, replace(broken, checkpoint=replace(result.checkpoint, factors=swapped)))


def test_factorised_linears_are_not_looked_at(tmp_path: Path) -> None:
    once = detected(laser_like(tmp_path / "model")).checkpoint
    names = [found.name for found, _ in examine(once, 1e-5)]
    assert not set(names) & set(RANKS)
    assert len(names) == 21 - len(RANKS)


def test_inspect_reports_what_it_finds(tmp_path: Path) -> None:
    folder = laser_like(tmp_path / "model", {DOWN: 3})
    options = [str(folder), "--detect-low-rank", "1e-5"]
    said = CliRunner().invoke(app, [*options, "--json"])
    report = json.loads(said.stdout)["low_rank"]
    (found,) = report["found"]
    assert (found["name"], found["rank"], found["lossless"]) == (DOWN, 3, True)
    assert found["error"] <= found["allowed"]
    assert (report["tolerance"], report["examined"]) == (1e-5, 21)
    printed = CliRunner(env={"COLUMNS": "200"}).invoke(app, options).stdout
    assert "1 of 21 dense linears" in printed
    assert DOWN in printed
    refused = CliRunner().invoke(app, ["--as", "llama2-7b", "--detect-low-rank", "1e-5"])
    assert isinstance(refused.exception, UsageError)
