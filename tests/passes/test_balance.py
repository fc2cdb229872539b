"""Balanced checkpoints compute what they did: bit for bit at float32, and where float16 overflowed before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mixt_export import network
from mixt_export.checkpoints import Checkpoint, Made, open_checkpoint, overlaid, write_checkpoint
from mixt_export.cli.export import app
from mixt_export.errors import MixtError, UsageError
from mixt_export.network import FactorizedLinear, build
from mixt_export.passes import Balance, PassResult, balance, run
from mixt_export.passes.maxima import intermediate_maxima
from mixt_export.targets import export
from mixt_export.targets.rewriting import Rewriting
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification.graph import open_graph
from mixt_export.verification.session import ExportedRunner
from mixt_export.verification.torch_model import TorchModel
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

ATTENTION = "model.layers.1.self_attn"
UP = "model.layers.1.mlp.up_proj"

STRUCTURES: dict[str, list[FactorizedLinear]] = {
    "low rank": [build.low_rank(UP, 48, 104, 7)],
    "tensor train": [build.tensor_train(UP, (4, 3, 4), (13, 2, 4), (5, 3))],
    "ring": [build.tensor_ring(UP, (6, 8), (8, 13), (3, 2))],
    "kronecker": [build.kronecker(UP, (6, 8), (8, 13), 3)],
    "tucker": [build.tucker2(UP, 48, 104, 9, 11)],
    "monarch": [build.monarch(UP, (6, 8), (8, 13))],
    "blast": [build.blast(UP, 48, 104, 5, (4, 6))],
    "block tensor train": [build.block_tensor_train(UP, (4, 3, 4), (13, 2, 4), 3)],
    "mixt": [build.mixt(UP, 48, 104, 4)],
    "padded mixt": [build.mixt(UP, 48, 104, 3, bond=3, paper_padding=True)],
    "tucker heads": [
        build.tucker_heads(f"{ATTENTION}.{kind}_proj", kind, 48, 4, 16, (10, 7, 2), shared=ATTENTION, kv_heads=2)
        for kind in "qkvo"
    ],
    "shared basis": [
        build.low_rank(f"model.layers.1.mlp.{kind}", 48, 104, 7, names=("shared.core0", f"{kind}.core1"))
        for kind in ("gate_proj", "up_proj")
    ],
}


def with_factors(base: Checkpoint, linears: list[FactorizedLinear], seed: int = 0) -> Checkpoint:
    """``base`` with random cores whose entries lie many orders of magnitude apart, slice by slice."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for core in {core.name: core for linear in linears for core in linear.core_tensors()}.values():
        values = rng.standard_normal(core.shape)
        for axis, size in enumerate(core.shape):
            spread = np.exp2(rng.integers(-6, 7, size))
            values *= spread.reshape([-1 if other == axis else 1 for other in range(values.ndim)])
        tensors[core.name] = Made("float32", core.shape, values.astype(np.float32).copy)
    return overlaid(base, tensors, {linear.name: linear for linear in linears})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("base")))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_stays_the_same_bit_for_bit(base: Checkpoint, structure: str) -> None:
    before = with_factors(base, STRUCTURES[structure])
    after = balance(before)
    rng = np.random.default_rng(1)
    for name, linear in before.factors.items():
        for dtype in (np.float32, np.float64):
            x = rng.standard_normal((3, linear.in_features)).astype(dtype)
            expected = network.apply(linear, before.store.read, x)
            np.testing.assert_array_equal(network.apply(after.factors[name], after.store.read, x), expected)
        np.testing.assert_array_equal(
            network.densify(after.factors[name], after.store.read), network.densify(linear, before.store.read)
        )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_numbers_leave_the_value_within_rounding(base: Checkpoint, structure: str) -> None:
    before = with_factors(base, STRUCTURES[structure])
    after = balance(before, whole=False)
    for name, linear in before.factors.items():
        x = np.random.default_rng(1).standard_normal((3, linear.in_features))
        expected = network.apply(linear, before.store.read, x)
        found = network.apply(after.factors[name], after.store.read, x)
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_balanced_once_is_balanced(base: Checkpoint, structure: str) -> None:
    """Every freedom is at rest: the slices it moves apart reach equally far, up to the rounding of exponents."""
    assert not run(Balance(), balance(with_factors(base, STRUCTURES[structure]))).changed


def test_the_scale_of_a_mixture_moves_into_its_cores(base: Checkpoint) -> None:
    for terms, whole, folds in ((4, True, True), (3, True, False), (3, False, True)):
        before = with_factors(base, [build.mixt(UP, 48, 104, terms)])
        after = balance(before, whole=whole).factors[UP]
        assert {branch.scale for branch in after.branches} == ({1.0} if folds else {1 / terms})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cores_of_16_bits_become_float32_and_lose_nothing(tmp_path: Path, dtype: str) -> None:
    low_rank = write_tiny_low_rank(tmp_path / "low", write_tiny(tmp_path / "base", dtype=dtype))
    source = open_checkpoint(low_rank)
    spread = {
        name: Made(dtype, ref.shape, lambda name=name: np.ldexp(source.store.read(name, "float64"), 6))
        for name, ref in source.store.refs.items()
        if name.endswith("core0")
    }
    before = overlaid(source, spread)
    after = balance(before)
    assert {core.dtype for core in after.factors[UP].core_tensors()} == {"float32"}
    for name, linear in before.factors.items():
        np.testing.assert_array_equal(
            network.densify(after.factors[name], after.store.read), network.densify(linear, before.store.read)
        )


def test_what_reaches_far_enough_is_left_alone(base: Checkpoint) -> None:
    values = {"core0": np.ones((48, 7)), "core1": np.ones((7, 104)) * 4.0}
    tensors = {f"{UP}.{name}": Made("float32", array.shape, array.copy) for name, array in values.items()}
    before = overlaid(base, tensors, {UP: build.low_rank(UP, 48, 104, 7)})
    assert run(Balance(least=2.0), before).checkpoint is before
    changed = run(Balance(least=1.0), before)
    assert changed.changed
    assert changed.record == {"driven_by": "weights", "powers_of_two": True, "linears": 1, "largest_power": 1.0}
    assert not run(Balance(), base).changed


def test_a_wrong_result_is_noticed(base: Checkpoint) -> None:
    before = with_factors(base, STRUCTURES["low rank"])
    rewriting = Balance()
    after = rewriting.call(before).checkpoint
    wrong = overlaid(after, {f"{UP}.core0": Made("float32", (48, 7), lambda: after.store.read(f"{UP}.core0") * 1.01)})
    wrong = replace(wrong, factors={**wrong.factors, UP: replace(wrong.factors[UP], method="other")})
    with pytest.raises(MixtError, match="changed what it computes"):
        rewriting.ensures(before, PassResult(wrong, True))


def test_maxima_pull_intermediates_to_one_size(base: Checkpoint) -> None:
    """A channel that text drives to 2^12 is scaled down, one that it leaves small up, whatever the weights say."""
    rng = np.random.default_rng(0)
    values = {"core0": rng.standard_normal((48, 2)), "core1": rng.standard_normal((2, 104))}
    tensors = {f"{UP}.{name}": Made("float32", array.shape, array.copy) for name, array in values.items()}
    before = overlaid(base, tensors, {UP: build.low_rank(UP, 48, 104, 2)})
    maxima = {f"{UP}#0#0": np.array([4096.0, 0.25], np.float32), f"{UP}#0#1": np.ones(104, np.float32)}
    after = balance(before, maxima=maxima)
    moved = after.store.read(f"{UP}.core0")[0] / before.store.read(f"{UP}.core0")[0]
    assert moved[0] <= 2.0**-2 < 1.0 < 2.0 <= moved[1]


def overflowing(folder: Path, base: Path, power: int = 12) -> Path:
    """A low rank folder whose bonds are scaled up by 2^power and down again."""
    source = open_checkpoint(write_tiny_low_rank(folder / "low", base, 16))
    store, tensors = source.store, {}
    for linear in source.factors.values():
        for ref, sign in zip(linear.core_tensors(), (1, -1), strict=True):
            values = np.ldexp(store.read(ref.name), sign * power)
            tensors[ref.name] = Made(ref.dtype, ref.shape, values.copy)
    changed = overlaid(source, tensors)
    (folder / "model").mkdir()
    write_checkpoint(folder / "model", changed, [], changed.factors, {})
    return folder / "model"


def logits(exported: Path) -> np.ndarray[Any, Any]:
    """Of 24 tokens, all positions; a graph for TensorRT runs with a rounding after every 16-bit value."""
    runner = ExportedRunner(open_graph(exported), 1, all_positions=True, layers=False)
    return np.asarray(runner.full(np.arange(24, dtype=np.int64)).logits[0])


def distance(exported: Path, model: Path) -> float:
    """Relative L2 of logits to PyTorch float32 on the model as it is stored; NaN or infinite where they overflow."""
    expected = TorchModel(model, threads=1).logits(np.arange(24, dtype=np.int64))
    with np.errstate(invalid="ignore"):
        return float(np.linalg.norm(logits(exported) - expected) / np.linalg.norm(expected))


def test_a_model_that_overflows_float16_is_rescued(tmp_path: Path) -> None:
    model = overflowing(tmp_path, write_tiny(tmp_path / "base", num_hidden_layers=1), 16)
    found = {}
    for mode in ("none", "auto"):
        options = TrtOptions(jetpack=6, max_input_len=64, scan=False)
        result = export(
            model, tmp_path / mode, target="trt", dtype="fp16", max_seq_len=64, trt=options, verify=False,
            rewriting=Rewriting(balance=mode),
        )  # fmt: skip
        found[mode] = distance(tmp_path / mode, model)
    assert not found["none"] <= 1.0
    assert found["auto"] <= 5e-3
    assert result.manifest["passes"]["balance"]["linears"] == 7


def test_float32_exports_are_left_alone_unless_asked(tmp_path: Path) -> None:
    model = overflowing(tmp_path, write_tiny(tmp_path / "base", num_hidden_layers=1))
    plain = export(model, tmp_path / "plain", verify=False)
    asked = export(model, tmp_path / "asked", verify=False, rewriting=Rewriting(balance="weights"))
    assert "passes" not in plain.manifest
    assert asked.manifest["passes"]["balance"]["largest_power"] >= 8.0
    np.testing.assert_array_equal(logits(tmp_path / "plain"), logits(tmp_path / "asked"))


def test_calibrated_balance_of_a_mixture(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", num_hidden_layers=1)
    model = write_tiny_mixt(tmp_path / "mixt", base, 4)
    result = export(model, tmp_path / "out", verify=False, rewriting=Rewriting(balance="calibrated"))
    assert distance(tmp_path / "out", model) <= 1e-5
    assert result.manifest["passes"]["balance"]["driven_by"] == "calibration"


def test_maxima_are_those_of_the_intermediates(tmp_path: Path) -> None:
    """What flows between the cores, recomputed from the inputs that were kept."""
    base = write_tiny(tmp_path / "base", num_hidden_layers=2)
    checkpoint = open_checkpoint(write_tiny_low_rank(tmp_path / "low", base, 5))
    maxima, inputs = intermediate_maxima(checkpoint, windows=2, length=16, keep_inputs=32)
    assert set(inputs) == set(checkpoint.factors)
    for name, x in inputs.items():
        assert x.shape == (32, checkpoint.factors[name].in_features)
        inner = x @ checkpoint.store.read(f"{name}.core0")
        np.testing.assert_allclose(maxima[f"{name}#0#0"], np.abs(inner).max(axis=0), rtol=1e-4)
        outer = inner @ checkpoint.store.read(f"{name}.core1")
        np.testing.assert_allclose(maxima[f"{name}#0#1"], np.abs(outer).max(axis=0), rtol=1e-4)


def test_the_command_line_says_what_was_done(tmp_path: Path) -> None:
    model = overflowing(tmp_path, write_tiny(tmp_path / "base", num_hidden_layers=1))
    run_cli = partial(CliRunner(env={"COLUMNS": "200"}).invoke, app)
    said = run_cli([str(model), "-o", str(tmp_path / "out"), "--balance", "weights", "--no-verify"])
    assert said.exit_code == 0, said.output
    assert "balanced by weights: 7 linears, slices of their cores moved by up to 2^1" in said.output
    refused = run_cli([str(model), "--dry-run", "--detect-low-rank", "1e-6"])
    assert isinstance(refused.exception, UsageError)
    assert isinstance(run_cli([str(model), "--dry-run", "--balance", "weights"]).exception, UsageError)
    together = [str(model), "-o", str(tmp_path / "int8"), "--balance", "weights", "--quantize", "int8", "--no-verify"]
    assert isinstance(run_cli(together).exception, UsageError)


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="--balance much: choose one of auto, none, weights, calibrated"):
        Rewriting(balance="much")
    for tolerance in (0.0, 1.0, -1e-6):
        with pytest.raises(UsageError, match=r"--detect-low-rank .* between 0 and 1"):
            Rewriting(detect_low_rank=tolerance)
