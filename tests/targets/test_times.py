"""Modelled times of whole models: sums that must hold, and the command that prints them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixt_export.accounting import open_source
from mixt_export.cli.inspect import app
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.families.wiring import MoeMlp
from mixt_export.network import build
from mixt_export.plan import choose_forms
from mixt_export.targets.devices import DEVICES, device_named
from mixt_export.targets.times import WAYS, Step, block_times, head_seconds, times_report
from tests.building.models import write_structure

DECODER = open_source("smollm2-135m").decoder
BOARD = device_named("agx-orin-64gb")


def test_every_device_can_be_planned_for() -> None:
    for device in DEVICES.values():
        gpu = device.gpu(4)
        assert (gpu.name, gpu.bandwidth, gpu.item) == (device.name, device.bandwidth, 4)
        assert gpu.cache > 0 and gpu.processors > 0
        links = [source for source in device.sources if "https://" in source or "http://" in source]
        assert links and all("not opened" in link or "excerpt read" in link for link in links)


def test_a_dense_model_takes_as_long_in_every_way() -> None:
    report = times_report("dense", DECODER, {}, BOARD)
    (decode, prefill) = report["groups"]
    assert decode["blocks"] == prefill["blocks"] == list(range(30))
    for group in (decode, prefill):
        assert len({round(group["linears"][way], 15) for way in WAYS}) == 1
        assert group["whole"]["dense"] == group["linears"]["dense"] + group["attention"] + group["glue"]
    total = report["totals"]["decode"]["planned"]
    assert total == pytest.approx(30 * decode["whole"]["planned"] + head_seconds(DECODER, BOARD.gpu()))
    read = 2 * (30 * 3_538_944 + 576 * 49_152) / (0.75 * BOARD.bandwidth)
    assert read < total < 2 * read


def test_one_block_of_another_method_stands_alone() -> None:
    linears = DECODER.blocks[3].linears
    factors = {x.name: build.tensor_train(x.name, *SITES[x.in_features, x.out_features], (8,)) for x in linears}
    report = times_report("one", DECODER, factors, BOARD)
    groups = {tuple(group["blocks"]): group for group in report["groups"] if group["step"] == "decode"}
    assert set(groups) == {(3,), tuple(index for index in range(30) if index != 3)}
    own = groups[3,]["linears"]
    assert (
        own["fused"] < own["stored"]
        and own["dense"] == groups[next(key for key in groups if key != (3,))]["linears"]["dense"]
    )


SITES = {
    (576, 576): ((24, 24), (24, 24)),
    (576, 192): ((24, 24), (12, 16)),
    (576, 1536): ((24, 24), (32, 48)),
    (1536, 576): ((32, 48), (24, 24)),
}


def test_attention_grows_with_the_cache() -> None:
    gpu = BOARD.gpu()
    plan = choose_forms([], device=gpu)
    steps = [Step("a", 1, 100), Step("b", 1, 1100)]
    first, second = block_times(DECODER, {}, plan, gpu, steps)[:2]
    # keys and values of 1000 more positions: read to be joined, written, and read by the attention
    more = 3 * 1000 * 2 * 2 * DECODER.kv_heads * DECODER.head_dim / (0.75 * BOARD.bandwidth)
    assert second.attention - first.attention == pytest.approx(more)


def inspected(*words: str | Path) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_command_for_a_folder(tmp_path: Path) -> None:
    model = write_structure(tmp_path, "tensor_train")
    report = json.loads(inspected(model, "--device", "orin-nano-8gb", "--json"))
    assert report["claim"].endswith("not measured") and report["device"]["name"] == "orin-nano-8gb"
    said = inspected(model, "--device", "orin-nano-8gb")
    assert "not measured" in said and "one kernel a linear" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--as", "smollm2-135m", "--device", "abacus"], "--device abacus: not in the table"),
        (["--as", "smollm2-135m", "--device", "agx-thor", "--method", "magic"], "--method magic"),
    ],
)
def test_bad_words(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        inspected(*words)


def test_a_preset_with_a_method() -> None:
    report = json.loads(inspected("--as", "smollm2-135m", "--method", "mixt", "--device", "agx-thor", "--json"))
    groups = [group["blocks"] for group in report["groups"] if group["step"] == "decode"]
    assert groups[0] == list(range(26)) and sorted(block for group in groups[1:] for block in group) == list(
        range(26, 30)
    )


def test_a_mixture_of_experts_is_refused() -> None:
    blocks = tuple(replace(block, mlp=MoeMlp.__new__(MoeMlp)) for block in DECODER.blocks)
    with pytest.raises(UnsupportedError, match="mixture of experts; which of them run depends on the token"):
        times_report("moe", replace(DECODER, blocks=blocks), {}, BOARD)
