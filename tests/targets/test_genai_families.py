"""Exported families beyond Llama's kin in onnxruntime-genai itself: the tokens our runtime gives, and PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixt_export.reference import load_reference
from mixt_export.targets import export
from tests.lower.matrix import logits_of
from tests.targets.test_genai import generate, ours
from tests.tiny import write_tiny

torch.set_num_threads(1)

#: Family -> the type under which genai loads it.
TYPES = {"gpt2": "decoder", "gptj": "decoder", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3_text"}


@pytest.mark.parametrize("family", TYPES)
def test_same_greedy_tokens(tmp_path: Path, family: str) -> None:
    folder = write_tiny(tmp_path / "model", family)
    export(folder, tmp_path / "out", target="ort", verify=False)
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["type"] == TYPES[family]
    ids = np.random.default_rng(2).integers(0, 256, 11).tolist()
    found = generate(tmp_path / "out", [ids], 8)[0]
    assert found == ours(tmp_path / "out", ids, 8)
    reference = load_reference(folder)
    for number, token in enumerate(found):
        assert logits_of(reference, np.array([*ids, *found[:number]]))[-1].argmax() == token
