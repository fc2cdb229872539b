"""Boards: which dialect and JetPack they take, whether a model fits, and the arithmetic behind the verdict."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from mixt_export.cli.export import app
from mixt_export.cli.guard import guarded
from mixt_export.errors import ResourceError, UsageError
from mixt_export.lower.dialects import DIALECTS
from mixt_export.plan import Choice
from mixt_export.targets import devices, export, plan_export
from mixt_export.targets.fit import BUILDER_BASE, BUILDER_FACTOR, LIBRARIES, _macs_per_token, fit
from mixt_export.targets.trt import TrtOptions
from tests.building.models import write_structure
from tests.tiny import write_tiny, write_tiny_low_rank


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("trt") / "model", num_hidden_layers=2, tied=False)


@pytest.mark.parametrize(
    ("options", "dialect", "jetpack"),
    [
        (TrtOptions(), "trt10", 6),
        (TrtOptions(jetpack=6), "trt10", 6),
        (TrtOptions(jetpack=7), "trt11", 7),
        (TrtOptions(device="orin-nano-8gb"), "trt10", 6),
        (TrtOptions(device="agx-orin-64gb", jetpack=7), "trt11", 7),
        (TrtOptions(device="agx-thor"), "trt11", 7),
        (TrtOptions(device="rtx-4090"), "trt11", None),
    ],
)
def test_board_and_jetpack_choose_the_dialect(
    model: Path, options: TrtOptions, dialect: str, jetpack: int | None
) -> None:
    plan = plan_export(model, target="trt", dtype="fp16", trt=options)
    assert plan.target.dialect.name == dialect and plan.trt is not None
    said = plan.trt.manifest(plan.islands, None)
    assert said["jetpack"] == jetpack and said["device"] == options.device
    assert [profile["name"] for profile in said["profiles"]] == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("target", "dtype", "options", "text"),
    [
        ("trt", "fp16", TrtOptions(device="agx-thor", jetpack=6), r"--jetpack 6: Jetson AGX Thor .* runs JetPack 7"),
        ("trt", "fp16", TrtOptions(device="rtx-4090", jetpack=7), r"--jetpack 7: GeForce RTX 4090 is no Jetson"),
        ("trt", "fp16", TrtOptions(jetpack=5), r"--jetpack 5: choose from 6, 7"),
        ("trt", "fp16", TrtOptions(device="toaster"), r"--device toaster: .* orin-nano-8gb, orin-nx-16gb"),
        ("ort", "fp16", TrtOptions(device="agx-thor"), r"--device is an option of --target trt"),
        ("onnx", "fp16", TrtOptions(max_batch=2), r"--max-batch is an option of --target trt"),
        ("trt", "fp16", TrtOptions(max_input_len=300), r"--max-input-len 300 exceeds --max-seq-len 256"),
        ("trt", "fp32", TrtOptions(islands=("residual",)), r"--island: everything is float32"),
        ("trt", "fp32", TrtOptions(scan=True), r"--scan looks for what overflows float16, the export is float32"),
        ("trt", "bf16", TrtOptions(scan=True), r"--scan looks for what overflows float16, the export is bfloat16"),
        ("ort", "bf16", None, r"--dtype bf16: --target ort takes float32 and float16"),
    ],
)
def test_contradictions(model: Path, target: str, dtype: str, options: TrtOptions | None, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        plan_export(model, target=target, dtype=dtype, trt=options)


def test_the_table_of_boards() -> None:
    for name, device in devices.DEVICES.items():
        assert device.name == name and 0 < device.reserved < device.visible and device.sources
        assert device.bandwidth > 1e10 and device.flops > 1e12
        assert all(number in devices.JETPACKS for number in device.jetpacks)
    assert all(pack.dialect in DIALECTS and pack.source for pack in devices.JETPACKS.values())


def test_the_parts_of_the_sum(model: Path) -> None:
    """Against arithmetic on the config: 2 layers, hidden 48, ffn 104, 4 heads and 2 kv heads of 16, vocab 300."""
    options = TrtOptions(device="orin-nx-16gb", max_batch=3, max_input_len=8)
    found = fit(plan_export(model, target="trt", dtype="fp16", max_seq_len=64, trt=options))
    block = 48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 104
    weights = 2 * (2 * 300 * 48 + 2 * block + 5 * 48)
    tables = 2 * 64 * 8 * 4
    assert 0 <= found.weights - weights - tables < 400
    assert found.cache == 2 * 3 * 64 * (2 * 2 * 2 * 16 * 2)
    scores = 3 * 4 * 8 * 64 * 4
    assert scores < found.activations < 8 * scores and found.attention == 0
    assert found.builder == BUILDER_BASE + int(BUILDER_FACTOR * found.weights)
    assert found.running == found.weights + found.cache + found.activations + LIBRARIES
    read = found.weights - 300 * 48 * 2 + 64 * (2 * 2 * 2 * 16 * 2)
    work = 2 * (2 * block + 300 * 48) + 4 * 64 * 2 * 64
    assert found.decode == pytest.approx(max(read / 102.4e9, work / 15e12), rel=1e-6)
    slow = replace(devices.DEVICES["orin-nx-16gb"], flops=1e6)
    plan = plan_export(model, target="trt", dtype="fp16", max_seq_len=64, trt=options)
    assert plan.trt is not None
    computing = fit(replace(plan, trt=replace(plan.trt, device=slow))).prefill
    assert computing == pytest.approx((8 * (2 * 2 * block + 4 * 64 * 2 * 4) + 2 * 300 * 48) / 1e6)  # the head runs once
    assert found.fits and found.swap == 0
    found.require()


def test_factors_make_it_smaller_and_faster(tmp_path: Path, model: Path) -> None:
    low = write_tiny_low_rank(tmp_path / "low", model, ranks=4)
    dense, factorised = (
        fit(plan_export(folder, target="trt", dtype="fp16", trt=TrtOptions(device="orin-nano-8gb")))
        for folder in (model, low)
    )
    assert factorised.weights < dense.weights and factorised.decode < dense.decode
    assert factorised.builder < dense.builder


def test_what_does_not_fit_says_what_would(model: Path) -> None:
    plan = plan_export(model, target="trt", dtype="fp16", trt=TrtOptions(device="orin-nano-8gb", max_input_len=16))
    found = fit(plan)
    room = found.running - found.cache // 2
    tight = replace(found, device=replace(found.device, visible=room, reserved=0))
    assert not tight.fits and tight.longest == 128
    with pytest.raises(ResourceError, match=r"Jetson Orin Nano 8GB: needs .* --max-seq-len 128 fits"):
        tight.require()
    hopeless = replace(found, device=replace(found.device, visible=1000, reserved=0))
    with pytest.raises(ResourceError, match="compress the model further"):
        hopeless.require()
    building = replace(found, builder=found.device.usable + 5)
    assert building.fits and building.swap == 5
    assert replace(building, device=devices.DEVICES["rtx-4090"]).swap == 0


def test_a_plan_without_a_board_has_no_verdict(model: Path) -> None:
    with pytest.raises(UsageError, match="--device"):
        fit(plan_export(model, target="trt"))


Said = tuple[int, str, str]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`mixt-export` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["mixt-export", *map(str, arguments)])
        code = guarded(typer.main.get_command(app), "mixt-export")
        return code, *capsys.readouterr()

    return run


def test_the_fit_is_that_of_the_planned_forms(tmp_path: Path) -> None:
    """A tensor train merged into its matrix holds, moves and computes what the matrix does, not what the cores do."""
    source = write_structure(tmp_path, "tensor_train")
    options = TrtOptions(device="orin-nano-8gb", max_input_len=32)
    found = {}
    for form in ("chain", "dense"):
        planned = plan_export(source, target="trt", dtype="fp16", max_seq_len=64, trt=options, forms=[("proj", form)])
        found[form] = fit(planned)
        per_token, head = _macs_per_token(planned)
        linears = planned.decoder.blocks[0].linears
        dense = sum(linear.in_features * linear.out_features for linear in linears)
        assert head == planned.decoder.vocab_size * planned.decoder.hidden_size
        assert (per_token == dense) == (form == "dense")
        assert per_token == sum(choice.form.macs for choice in planned.forms.choices.values())
    held = {form: sum(choice.form.elements for choice in plan_forms(source, form).values()) for form in found}
    assert found["dense"].weights - found["chain"].weights == pytest.approx(
        2 * (held["dense"] - held["chain"]), rel=0.02
    )
    assert found["chain"].activations > found["dense"].activations
    assert found["dense"].decode > found["chain"].decode


def plan_forms(source: Path, form: str) -> dict[str, Choice]:
    planned = plan_export(source, target="trt", dtype="fp16", max_seq_len=64, forms=[("proj", form)])
    return dict(planned.forms.choices)


def test_dry_run_on_the_command_line(tmp_path: Path, model: Path, cli: Callable[..., Said]) -> None:
    common = (model, "--target", "trt", "--fp16", "--device", "orin-nano-8gb", "--dry-run")
    code, out, err = cli(*common)
    assert code == 0, err
    for text in ("weights", "KV cache", "activations", "builder", "roofline (a model", "fits:", "never run there"):
        assert text in out
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 1 << 20}
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(config))
    (large / "model.safetensors").hardlink_to(model / "model.safetensors")
    code, out, err = cli(large, *common[1:], "--max-seq-len", str(1 << 20), "--max-batch", "32")
    assert code == 5 and err.count("\n") == 1
    assert "Jetson Orin Nano 8GB: needs" in err and "sum" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "trt", "--fp16", "--bf16"),
        ("--target", "trt", "--dtype", "bf16", "--fp16"),
        ("--target", "trt", "--dtype", "fp32", "--fp16"),
        ("--device", "agx-thor"),
        ("--target", "trt", "--fp16", "--scan"),
    ],
)
def test_contradictions_on_the_command_line_are_2(
    model: Path, arguments: tuple[str, ...], cli: Callable[..., Said]
) -> None:
    code, _, err = cli(model, *arguments, "--dry-run")
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: --")


@pytest.mark.parametrize("dtype", ["fp16", "float16"])
def test_two_ways_to_say_the_same_are_no_contradiction(model: Path, dtype: str, cli: Callable[..., Said]) -> None:
    code, out, err = cli(model, "--dtype", dtype, "--fp16", "--dry-run")
    assert code == 0 and "float16" in out, err


@pytest.mark.parametrize(
    ("file", "words", "dtype"),
    [
        ('dtype = "fp16"', ("--bf16",), "bfloat16"),
        ("fp16 = true", ("--bf16",), "bfloat16"),
        ("fp16 = true", ("--dtype", "fp32"), "float32"),
        ("bf16 = true", (), "bfloat16"),
        ('dtype = "fp16"', (), "float16"),
    ],
)
def test_the_command_line_wins_over_a_file(
    tmp_path: Path, model: Path, cli: Callable[..., Said], file: str, words: tuple[str, ...], dtype: str
) -> None:
    (tmp_path / "c.toml").write_text(file)
    code, out, err = cli(model, "--target", "trt", "--config", tmp_path / "c.toml", *words, "--dry-run")
    assert code == 0, err
    assert f" {dtype}" in out


def test_a_file_that_contradicts_itself(tmp_path: Path, model: Path, cli: Callable[..., Said]) -> None:
    (tmp_path / "c.toml").write_text('fp16 = true\ndtype = "bf16"')
    code, _, err = cli(model, "--target", "trt", "--config", tmp_path / "c.toml", "--dry-run")
    assert code == 2 and "--dtype bf16 and --fp16 contradict each other" in err


def test_the_manifest_says_what_a_board_needs(tmp_path: Path, model: Path) -> None:
    options = TrtOptions(device="orin-nx-16gb", max_batch=2, islands=("residual",))
    result = export(model, tmp_path / "out", target="trt", dtype="fp16", verify=False, trt=options)
    said = json.loads((tmp_path / "out" / "mixt_manifest.json").read_text())
    assert said == result.manifest and said["target"] == "trt" and said["dialect"] == "trt10" and said["opset"] == 20
    assert said["padding"] == "left" and said["kv"]["shared_buffer"] is False
    trt = said["trt"]
    assert trt["strongly_typed"] is True and trt["max_batch"] == 2 and trt["device"] == "orin-nx-16gb"
    assert trt["islands"] == {"residual": True, "attention": [], "linears": {}} and trt["overflow"] is None
