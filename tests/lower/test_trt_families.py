"""Families beyond Llama's kin in both TensorRT dialects, run by ONNX Runtime on the CPU, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixt_export.targets import export, plan_export
from mixt_export.targets.trt import TrtOptions
from tests.lower.matrix import worst
from tests.lower.test_trt_dialects import mixed
from tests.lower.variants import VARIANTS, folder_of
from tests.tiny import write_tiny, write_tiny_low_rank

torch.set_num_threads(1)

JETPACKS = [6, 7]


@pytest.mark.parametrize("variant", VARIANTS)
def test_families(tmp_path: Path, variant: str) -> None:
    folder = folder_of(tmp_path, variant)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for jetpack in JETPACKS:
        for dtype, low, high in (("fp32", 0.0, 1e-5), ("fp16", 1e-5, 8e-3)):
            out = tmp_path / f"{jetpack}-{dtype}"
            export(folder, out, target="trt", dtype=dtype, verify=False, trt=TrtOptions(jetpack=jetpack))
            error = worst(model, out)
            assert low <= error < high, f"JetPack {jetpack}, {dtype}: {error}"


#: Every kind of island, on linears that exist in the family; the MLP's last writes into the stream.
ISLANDS = {
    "gpt2": ("attention.0", "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "lm_head=2"),
    "gptj": ("attention.0", "transformer.h.0.attn.q_proj=3", "transformer.h.0.mlp.fc_in", "lm_head=2"),
    "gemma2": ("attention.0", "model.layers.0.mlp.up_proj=3", "model.layers.0.self_attn.o_proj", "lm_head=2"),
    "gemma3_text": ("residual", "model.layers.0.self_attn.k_proj=3", "model.layers.1.mlp.down_proj"),
}


@pytest.mark.parametrize("jetpack", JETPACKS)
@pytest.mark.parametrize("family", ISLANDS)
def test_islands_change_no_result_and_types_agree(tmp_path: Path, family: str, jetpack: int) -> None:
    base = write_tiny(tmp_path / "model", family)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    trt = TrtOptions(jetpack=jetpack, islands=ISLANDS[family])
    export(base, tmp_path / "out", target="trt", dtype="fp16", verify=False, trt=trt)
    assert 1e-5 < worst(model, tmp_path / "out") < 8e-3
    low_rank = write_tiny_low_rank(tmp_path / "low-rank", base)
    for folder in (base, low_rank):
        for dtype in ("fp16", "bf16"):
            assert mixed(plan_export(folder, target="trt", dtype=dtype, trt=trt).lowered.model) == []
