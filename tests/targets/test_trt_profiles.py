"""Optimisation profiles: every shape is one that could run, limits hold, contradictions are one sentence."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mixt_export.building.toolkit import toolkit
from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import ResourceError, UsageError
from mixt_export.families import decoder_of
from mixt_export.families.wiring import Decoder
from mixt_export.targets import plan_export
from mixt_export.targets.profiles import BOUNDS, profiles
from mixt_export.targets.trt import TrtOptions
from tests.tiny import write_tiny


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return decoder_of(open_checkpoint(write_tiny(tmp_path / "model")).config)


def merged(both: list[dict[str, Any]]) -> dict[str, Any]:
    """The one profile of both that the device scripts build by default."""
    tools = toolkit("manifest")
    return dict(tools.merged(tuple(tools.parse_profile(profile) for profile in both)).as_dict())


def contradictions(profile: dict[str, Any]) -> list[str]:
    """Bounds out of order, and shapes that no run has: the mask must be as long as cache and new tokens together."""
    wrong = []
    for name, shape in profile["inputs"].items():
        for low, opt, high in zip(*(shape[bound] for bound in BOUNDS), strict=True):
            if not 0 <= low <= opt <= high:
                wrong.append(name)
    for bound in BOUNDS:
        (batch, seq), (rows, total) = (profile["inputs"][n][bound] for n in ("input_ids", "attention_mask"))
        pasts = {tuple(s[bound]) for n, s in profile["inputs"].items() if n.startswith("past")}
        (past,) = pasts
        if batch != rows or past[0] != batch or seq + past[2] != total:
            wrong.append(f"{bound}: {batch, seq, rows, total, past}")
    return wrong


@pytest.mark.parametrize(("batch", "prompt", "length"), list(product([1, 4], [1, 7, 64], [64, 256])))
def test_every_shape_could_run(decoder: Decoder, batch: int, prompt: int, length: int) -> None:
    both = profiles(decoder, batch, prompt, length)
    assert [profile["name"] for profile in both] == ["prefill", "decode"]
    for profile in (*both, merged(both)):
        assert contradictions(profile) == []
        assert list(profile["inputs"]) == [
            "input_ids", "attention_mask", *(f"past_key_values.{i}.{p}" for i in range(3) for p in ("key", "value")),
        ]  # fmt: skip
    prefill, decode = (profile["inputs"] for profile in both)
    assert prefill["input_ids"]["max"] == [batch, prompt]
    # one new token, but not fixed at one: that would hold every linear's weights twice
    assert decode["input_ids"] == {"min": [1, 1], "opt": [1, 1], "max": [batch, 2]}
    assert decode["attention_mask"]["max"] == [batch, length + 1]
    assert decode["past_key_values.0.key"] == {
        "min": [1, 2, 0, 16], "opt": [1, 2, length // 2, 16], "max": [batch, 2, length - 1, 16],
    }  # fmt: skip


def test_one_profile_admits_what_either_does(decoder: Decoder) -> None:
    both = profiles(decoder, 2, 8, 64)
    one = merged(both)
    for profile in both:
        for name, shape in profile["inputs"].items():
            assert all(a <= b for a, b in zip(one["inputs"][name]["min"], shape["min"], strict=True))
            assert all(a >= b for a, b in zip(one["inputs"][name]["max"], shape["max"], strict=True))
    assert one["name"] == "prefill+decode" and one["inputs"]["input_ids"]["opt"] == [1, 1]


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((0, 8, 64), "--max-batch 0"),
        ((1, 0, 64), "--max-input-len 0"),
        ((1, 8, 1), "--max-seq-len 1"),
        ((1, 65, 64), "--max-input-len 65 exceeds --max-seq-len 64"),
    ],
)
def test_contradictions(decoder: Decoder, sizes: tuple[int, int, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        profiles(decoder, *sizes)


def test_defaults_follow_the_model(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", num_hidden_layers=1)
    settings = plan_export(folder, target="trt", max_seq_len=100, trt=TrtOptions()).trt
    assert settings is not None and (settings.max_batch, settings.max_input_len) == (1, 100)
    prefill = settings.profiles[0]["inputs"]
    assert prefill["attention_mask"]["opt"] == [1, 100] and contradictions(settings.profiles[0]) == []


@pytest.mark.parametrize("batch", [2**31 // 128 + 1, 99_999_999_999_999])
def test_more_positions_than_any_device_holds(decoder: Decoder, batch: int) -> None:
    assert profiles(decoder, 2**31 // 128 - 1, 64, 128)
    with pytest.raises(ResourceError, match=f"--max-batch {batch}: .*lower one of them"):
        profiles(decoder, batch, 64, 128)
