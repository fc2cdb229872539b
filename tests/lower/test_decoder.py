"""Whole decoders: every family and dialect against transformers, which shares no code with the lowering."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mixt_export.targets import export
from tests.lower.matrix import logits_of, worst
from tests.ortrun import Graph, relative
from tests.tiny import write_tiny

torch.set_num_threads(1)
WINDOW = 5

VARIANTS = {
    "llama": {},
    "llama-untied-bias": {"model_type": "llama", "tied": False, "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-linear": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama-3.1": {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2-yarn": {
        "model_type": "qwen2",
        "max_position_embeddings": 512,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    },
    "mistral": {"model_type": "mistral"},
    "mistral-window": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2", "tied": False},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3-untied-bf16": {"model_type": "qwen3", "tied": False, "dtype": "bfloat16", "shards": 2},
}


def folder_of(tmp_path: Path, variant: str) -> Path:
    options = dict(VARIANTS[variant])
    return write_tiny(tmp_path / "model", options.pop("model_type", variant), **options)


def reference(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_chunks_decode_and_ragged_batch(tmp_path: Path, variant: str, target: str) -> None:
    folder = folder_of(tmp_path, variant)
    export(folder, tmp_path / "out", target=target, verify=False)
    assert worst(reference(folder), tmp_path / "out", left_padded=target == "onnx") < 1e-5


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_float16_is_close_to_float32_and_not_equal(tmp_path: Path, target: str) -> None:
    folder = folder_of(tmp_path, "qwen3")
    export(folder, tmp_path / "out", target=target, dtype="fp16", verify=False)
    ids = np.random.default_rng(3).integers(0, 300, 17)
    expected = logits_of(reference(folder), ids)[-1]
    logits, present = Graph(tmp_path / "out").run(ids[None])
    assert logits.dtype == np.float32 and present[0].dtype == np.float16
    assert 1e-6 < relative(logits[0], expected) < 5e-3


def test_first_layers_only(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama")
    model = reference(folder)
    model.model.layers = model.model.layers[:2]
    ids = np.random.default_rng(5).integers(0, 300, 6)
    export(folder, tmp_path / "out", num_layers=2, verify=False)
    assert relative(Graph(tmp_path / "out").run(ids[None])[0][0], logits_of(model, ids)[-1]) < 1e-5


def test_hidden_states_carry_the_names_that_verification_reads(tmp_path: Path) -> None:
    import onnx

    export(folder_of(tmp_path, "llama"), tmp_path / "out", verify=False)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    names = {node.name: node for node in graph.node}
    assert "/lm_head/last_position" in names
    outputs = {output for node in graph.node for output in node.output}
    assert {f"/model/layers.{i}/output" for i in range(3)} <= outputs
    assert all(node.name for node in graph.node) and len(names) == len(graph.node)
