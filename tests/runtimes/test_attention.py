"""Which of ONNX Runtime's ways to attend the runner asks for, and that both give the same logits."""

from __future__ import annotations

import dataclasses
import os
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.runtimes.conftest import Tiny

SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the environment says whenever a session is made."""
    found: list[str | None] = []
    make = onnxruntime.InferenceSession

    def session(*given: Any, **named: Any) -> Any:
        found.append(os.environ.get(SWITCH))
        return make(*given, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return found


def test_whole_rows_of_scores_while_a_session_is_made(
    monkeypatch: pytest.MonkeyPatch, seen: list[str | None], rt: ModuleType, tiny_ort: Tiny
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    rt.Model(tiny_ort.folder, threads=1)
    assert seen == ["1"] and SWITCH not in os.environ


def test_what_the_user_says_stays(
    monkeypatch: pytest.MonkeyPatch, seen: list[str | None], rt: ModuleType, tiny_ort: Tiny
) -> None:
    monkeypatch.setenv(SWITCH, "0")
    rt.Model(tiny_ort.folder, threads=1)
    assert seen == ["0"] and os.environ[SWITCH] == "0"


def test_int8_keys_are_read_in_tiles(monkeypatch: pytest.MonkeyPatch, rt: ModuleType, tiny_ort: Tiny) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    with rt._attention(dataclasses.replace(tiny_ort.model.manifest, kv_dtype="int8")):
        assert SWITCH not in os.environ
    with pytest.raises(ValueError, match="no session"), rt._attention(tiny_ort.model.manifest):
        assert os.environ[SWITCH] == "1"
        raise ValueError("no session")
    assert SWITCH not in os.environ


def test_both_ways_give_the_same_logits(monkeypatch: pytest.MonkeyPatch, rt: ModuleType, tiny_ort: Tiny) -> None:
    ids = np.random.default_rng(3).integers(0, tiny_ort.shape.vocab, 40).tolist()
    found = []
    for tiles in ("0", "1"):
        monkeypatch.setenv(SWITCH, tiles)
        model = rt.Model(tiny_ort.folder, threads=1)
        cache = model.new_cache()
        found.append([model.prefill([ids[:-2]], cache, chunk=7), model.step([ids[-2]], cache)])
    assert np.linalg.norm(np.subtract(*found)) / np.linalg.norm(found[0]) < 1e-5
