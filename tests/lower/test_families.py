"""Families beyond Llama's kin against transformers, which shares no code with the lowering: targets ort and onnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import UnsupportedError
from mixt_export.targets import export, plan_export
from tests.lower.matrix import logits_of, worst
from tests.lower.variants import VARIANTS, folder_of
from tests.ortrun import Graph, relative
from tests.tiny import write_tiny

torch.set_num_threads(1)


def reference(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_chunks_decode_and_padded_batch(tmp_path: Path, variant: str) -> None:
    folder = folder_of(tmp_path, variant)
    model = reference(folder)
    for target in ("ort", "onnx"):
        export(folder, tmp_path / target, target=target, verify=False)
        assert worst(model, tmp_path / target, left_padded=target == "onnx") < 1e-5, target


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2", "gemma3_text"])
def test_float16_is_close_to_float32_and_not_equal(tmp_path: Path, family: str, target: str) -> None:
    folder = write_tiny(tmp_path / "model", family)
    export(folder, tmp_path / "out", target=target, dtype="fp16", verify=False)
    ids = np.random.default_rng(3).integers(0, 300, 17)
    logits, present = Graph(tmp_path / "out").run(ids[None])
    assert logits.dtype == np.float32 and present[0].dtype == np.float16
    assert 1e-6 < relative(logits[0], logits_of(reference(folder), ids)[-1]) < 5e-3


@pytest.mark.parametrize(
    ("family", "text", "change"),
    [
        ("gptj", "the rotary dimension 8 is not a multiple of 16", {"rotary_dim": 8}),
        ("gemma2", "head_dim 24 is not a multiple of 16", {"head_dim": 24}),
        ("gpt2", "head_dim 12 is not a multiple of 8", {"n_head": 4}),
    ],
)
def test_what_onnxruntimes_attention_lacks_is_refused_there_and_runs_elsewhere(
    tmp_path: Path, family: str, text: str, change: dict[str, int]
) -> None:
    folder = write_tiny(tmp_path / "model", family, **change)
    with pytest.raises(UnsupportedError, match=rf"{text}.*--target onnx"):
        plan_export(folder, target="ort")
    export(folder, tmp_path / "out", target="onnx", verify=False)
    assert worst(reference(folder), tmp_path / "out") < 1e-5


def test_weights_stored_in_out_are_used_where_they_lie(tmp_path: Path) -> None:
    """GPT-2's Conv1D layout is what MatMul takes: nothing but constants and the tables is written."""
    folder = write_tiny(tmp_path / "model", "gpt2")
    for target in ("ort", "onnx"):
        plan = plan_export(folder, target=target)
        assert plan.written_bytes == 0
    weights = open_checkpoint(folder).store
    names = {value.name for value in plan.lowered.model.graph.initializers.values() if "/" not in str(value.name)}
    assert names == set(weights)


def test_a_softcap_and_a_window_change_the_result(tmp_path: Path) -> None:
    """Negative control: the tiny models are such that leaving either out would be seen."""
    ids = np.random.default_rng(5).integers(0, 300, 19)
    full = write_tiny(tmp_path / "full", "gemma2")
    expected = logits_of(reference(full), ids)[-1]
    for key, value in (("attn_logit_softcapping", None), ("final_logit_softcapping", None), ("sliding_window", 200)):
        other = write_tiny(tmp_path / key, "gemma2", **{key: value})
        assert relative(logits_of(reference(other), ids)[-1], expected) > 1e-3, key
