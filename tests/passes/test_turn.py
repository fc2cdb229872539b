"""Turned factors have the product they had, whichever way round they are stored, and integers fit them better."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from mixt_export import network
from mixt_export.checkpoints import Made, open_checkpoint, overlaid, write_checkpoint
from mixt_export.errors import MixtError, ResourceError, UsageError
from mixt_export.network import build
from mixt_export.passes import PassResult, Turn, run
from mixt_export.passes.turn import pairs, turned
from mixt_export.progress import SILENT
from mixt_export.quantisation import Quantisation, dequantised, nearest
from mixt_export.targets import export
from mixt_export.targets.rewriting import Rewriting
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification import verify
from mixt_export.verification.checks import quantised_weights
from mixt_export.verification.context import Context
from mixt_export.verification.options import VerifyOptions
from tests.flips import with_flips
from tests.tiny import write_tiny, write_tiny_low_rank
from tests.verbs import run_verb

OPTIONS = VerifyOptions(positions=32, memory=False, write=False, threads=1)
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_tiny_low_rank(folder / "model", write_tiny(folder / "base", num_hidden_layers=2), 19)


def low(bits: str = "int8", **options: object) -> Quantisation:
    """Of tiny models every matrix counts."""
    named = Quantisation.named(bits, rounding="nearest", measure=False, int8_for=("none",))
    return replace(named, min_elements=256, **options)


def ill_conditioned(rng: np.random.Generator, inputs: int, outputs: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a singular value decomposition whose values fall by a factor of thousand."""
    left, _ = np.linalg.qr(rng.standard_normal((inputs, rank)))
    right, _ = np.linalg.qr(rng.standard_normal((outputs, rank)))
    values = np.logspace(0, -3, rank)
    return left * np.sqrt(values), np.sqrt(values)[:, None] * right.T


@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(48, 31, 17), (20, 64, 20), (9, 9, 1)])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_product_stays(inputs: int, outputs: int, rank: int, share: float) -> None:
    rng = np.random.default_rng(rank)
    first, second = rng.standard_normal((inputs, rank)) * rng.uniform(0.01, 10, rank), rng.normal(size=(rank, outputs))
    one, other = turned(first, second, share)
    assert one.shape == first.shape
    assert other.shape == second.shape
    assert np.linalg.norm(one @ other - first @ second) < 1e-13 * np.linalg.norm(first) * np.linalg.norm(second)
    if rank > 1:
        assert np.linalg.norm(one - first) > 0.1 * np.linalg.norm(first)


def test_no_rank_is_lost_where_values_are_zero() -> None:
    """A column of zeros: shapes stay, nothing becomes NaN."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((12, 5)), rng.standard_normal((5, 8))
    first[:, 3] = 0
    one, other = turned(first, second)
    assert one.shape == (12, 5)
    assert np.allclose(one @ other, first @ second, atol=1e-12)
    assert all(np.isfinite(part).all() for part in turned(np.zeros((4, 2)), np.zeros((2, 3))))


def test_integers_fit_turned_factors_better() -> None:
    """The product of int4 factors, groups of 32, of a decomposition as a compressor stores it."""
    rng = np.random.default_rng(3)
    first, second = ill_conditioned(rng, 128, 160, 64)

    def error(one: np.ndarray, other: np.ndarray) -> float:
        rounded = [dequantised(nearest(part.T.astype(np.float32), 4, 32)).T.astype(np.float64) for part in (one, other)]
        return float(np.linalg.norm(rounded[0] @ rounded[1] - first @ second) / np.linalg.norm(first @ second))

    assert error(*turned(first, second)) < 0.85 * error(first, second)


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_pass_turns_cores_as_they_are_stored(
    tmp_path: Path, model: Path, flips: tuple[bool, bool], dtype: str
) -> None:
    base, rng = open_checkpoint(model), np.random.default_rng(5)
    linear = with_flips(build.low_rank(UP, 48, 104, 17, dtype=dtype, names=("a.core0", "a.core1")), flips)
    values = {core.name: rng.standard_normal(core.shape).astype(dtype) for core in linear.core_tensors()}
    made = {name: Made(dtype, value.shape, lambda value=value: value) for name, value in values.items()}
    checkpoint = overlaid(base, made, {UP: linear})
    result = run(Turn([UP], tmp_path), checkpoint)
    after = result.checkpoint.factors[UP]
    assert [core.name for core in after.core_tensors()] == ["a.core0", "a.core1"]
    assert {core.dtype for core in after.core_tensors()} == {"float32"}
    expected = network.densify(linear, checkpoint.store.read)
    found = network.densify(after, result.checkpoint.store.read)
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)
    for name, value in values.items():
        assert not np.allclose(result.checkpoint.store.read(name, "float32"), value, atol=1e-3)
    assert result.record == {"linears": 1, "share": 0.25}


def test_what_is_not_two_factors_of_its_own_is_left_alone(tmp_path: Path, model: Path) -> None:
    """A shared basis, a train, a rank beyond the features; asking for one is an error of ours."""
    shared = {
        name: build.low_rank(name, 48, 104, 7, names=("shared.core0", f"{name}.core1"))
        for name in (UP, UP.replace("up", "gate"))
    }
    train = build.tensor_train(UP, (4, 12), (13, 8), (5,))
    wide = build.low_rank(UP, 48, 104, 50)
    assert pairs(shared) == pairs({UP: train}) == pairs({UP: wide}) == {}
    assert list(pairs({UP: build.low_rank(UP, 48, 104, 48)})) == [UP]
    with pytest.raises(MixtError, match="is not of two factors"):
        run(Turn(["nothing"], tmp_path), open_checkpoint(model))


def test_a_pass_that_changes_a_linear_is_found(tmp_path: Path, model: Path) -> None:
    checkpoint = open_checkpoint(model)
    rewriting = Turn([UP, DOWN], tmp_path)
    result = rewriting.call(checkpoint)
    rewriting.ensures(checkpoint, result)
    name = f"{DOWN}.core1"
    wrong = result.checkpoint.store.read(name, "float32").copy()
    wrong[3] *= 1.01
    changed = overlaid(result.checkpoint, {name: Made("float32", wrong.shape, lambda: wrong)})
    with pytest.raises(MixtError, match=r"down_proj': turning changed what it computes"):
        rewriting.ensures(checkpoint, PassResult(changed, True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export(model, out, quantisation=low(), verify=False)
    return out


def manifest_of(out: Path) -> dict:
    return json.loads((out / "mixt_manifest.json").read_text())


def test_an_export_turns_what_it_quantises_and_is_proven(exported: Path, model: Path) -> None:
    manifest = manifest_of(exported)
    assert manifest["passes"]["turn"]["linears"] == 14
    turned_linears = manifest["quantisation"]["turned"]
    assert len(turned_linears) == 14
    assert all(1e-4 < error < 0.02 for error in turned_linears.values())
    assert [path.name for path in exported.parent.iterdir()] == ["out"]
    report = verify(exported, model, options=OPTIONS)
    assert report.passed


@pytest.mark.parametrize("kind", ["float", "dense", "asked"])
def test_what_stays_as_it_is_stored(tmp_path: Path, model: Path, kind: str) -> None:
    """Float exports, linears that are written as one matrix, and where turning was switched off."""
    forms = [("proj", "dense")] if kind == "dense" else []
    quantisation = None if kind == "float" else low()
    rewriting = Rewriting(turn=kind != "asked")
    export(model, tmp_path / "out", quantisation=quantisation, forms=forms, rewriting=rewriting, verify=False)
    manifest = manifest_of(tmp_path / "out")
    assert "turn" not in manifest.get("passes", {})
    assert "turned" not in manifest.get("quantisation", {})
    if quantisation is not None:
        assert quantised_weights.run(Context(tmp_path / "out", model, OPTIONS, SILENT)).passed


@pytest.mark.parametrize("target", ["trt", "onnx"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_other_targets(tmp_path: Path, model: Path, target: str, bits: str) -> None:
    group = {} if bits == "int8" else {"group": 16}
    board = {"dtype": "fp16", "trt": TrtOptions(jetpack=7)} if target == "trt" else {}
    export(model, tmp_path / "out", target=target, quantisation=low(bits, **group), verify=False, **board)
    assert manifest_of(tmp_path / "out")["quantisation"]["turned"]
    result = quantised_weights.run(Context(tmp_path / "out", model, OPTIONS, SILENT))
    assert result.passed, result


def _flip(out: Path, part: str, name: str) -> None:
    """One more in one byte of an initializer."""
    proto = onnx.load_model(str(out / "model.onnx"), load_external_data=False)
    listed = manifest_of(out)["quantisation"]["matrices"]
    tensor = next(each for each in proto.graph.initializer if each.name == listed[name][part])
    place = int({entry.key: entry.value for entry in tensor.external_data}["offset"]) + 6
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[place] = (data[place] + 1) % 256
    (out / "model.onnx.data").write_bytes(data)


def _listed(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def fault(out: Path) -> None:
        manifest = manifest_of(out)
        change(manifest["quantisation"])
        (out / "mixt_manifest.json").write_text(json.dumps(manifest))

    return fault


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda out: _flip(out, "codes", f"{DOWN}.core0"), "of their product"),
        (lambda out: _flip(out, "codes", f"{UP}.core1"), "of their product"),
        (lambda out: _flip(out, "scales", f"{UP}.core0"), "of their product"),
        (_listed(lambda entry: entry["turned"].update({DOWN: entry["turned"][DOWN] * 1.001})), "when written"),
        (_listed(lambda entry: entry["turned"].pop(UP)), "of the weights"),
    ],
)
def test_faults_are_found(
    tmp_path: Path, exported: Path, model: Path, fault: Callable[[Path], None], says: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    fault(out)
    result = quantised_weights.run(Context(out, model, OPTIONS, SILENT))
    assert not result.passed
    assert says in result.reason
    assert result.where.startswith((UP, DOWN))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda entry: entry["turned"].update(nothing=0.1), r"names 'nothing', which is not of two factors"),
        (lambda entry: entry.update(turned=[1, 2]), "is not a number for each linear"),
        (lambda entry: entry["turned"].update({UP: "much"}), "is not a number for each linear"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, exported: Path, model: Path, change: Callable[[dict], None], says: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    _listed(change)(out)
    with pytest.raises(UsageError, match=says):
        quantised_weights.run(Context(out, model, OPTIONS, SILENT))


def test_integers_of_another_product_are_found_whatever_the_manifest_says(
    tmp_path: Path, exported: Path, model: Path
) -> None:
    """The reference is another model: its weights are not those of the integers."""
    other = write_tiny_low_rank(tmp_path / "other", model.parent / "base", 19, seed=2)
    result = quantised_weights.run(Context(exported, other, OPTIONS, SILENT))
    assert not result.passed
    assert "integers of its factors are off by" in result.reason


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match=r"turning factors .*needs .* MB in .*out, but only 0\.0 MB are free"):
        export(model, tmp_path / "out", quantisation=low(), verify=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_did(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model"
    source.mkdir()
    wide = write_tiny_low_rank(tmp_path / "wide", write_tiny(tmp_path / "b", hidden_size=96, intermediate_size=208), 32)
    write_checkpoint(source, open_checkpoint(wide), [], open_checkpoint(wide).factors, {})
    arguments = [source, "-o", tmp_path / "out", "--quantize", "int8", "--no-loss", "--no-verify"]

    def mixt(*more: object) -> str:
        assert run_verb("export", *arguments, *more) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "turned the factors of" in mixt()
    assert "turned" not in mixt("--no-turn", "--overwrite")
