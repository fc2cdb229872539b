"""Both TensorRT dialects, run by ONNX Runtime on the CPU, against transformers, which shares no code with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mixt_export.reference import load_reference
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.lower.matrix import worst
from tests.ortrun import Graph, relative
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

torch.set_num_threads(1)

JETPACKS = [6, 7]
VARIANTS = {
    "llama-bias": {"model_type": "llama", "tied": False, "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-one-kv": {"model_type": "llama", "num_key_value_heads": 1},
    "mistral-window": {"model_type": "mistral", "sliding_window": 5},
    "qwen2-yarn": {
        "model_type": "qwen2",
        "max_position_embeddings": 512,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    },
    "qwen3": {"model_type": "qwen3", "tied": False, "dtype": "bfloat16"},
}


def folder_of(tmp_path: Path, variant: str) -> Path:
    options = {"num_hidden_layers": 2, **VARIANTS[variant]}
    return write_tiny(tmp_path / "model", str(options.pop("model_type")), **options)


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


@pytest.mark.parametrize("jetpack", JETPACKS)
@pytest.mark.parametrize("method", ["low rank", "mixt"])
def test_factorised_linears(tmp_path: Path, method: str, jetpack: int) -> None:
    base = write_tiny(tmp_path / "base", "qwen2", num_hidden_layers=2)
    write = write_tiny_low_rank if method == "low rank" else write_tiny_mixt
    folder = write(tmp_path / "model", base, include=lambda name: not name.endswith("v_proj"))
    export(folder, tmp_path / "out", target="trt", verify=False, trt=TrtOptions(jetpack=jetpack))
    assert worst(load_reference(folder), tmp_path / "out") < 1e-5


@pytest.mark.parametrize("jetpack", JETPACKS)
def test_the_mask_matters(tmp_path: Path, jetpack: int) -> None:
    """Negative control: the numbers above would differ if padding were seen."""
    folder = folder_of(tmp_path, "llama-mha")
    export(folder, tmp_path / "out", target="trt", verify=False, trt=TrtOptions(jetpack=jetpack))
    graph, ids = Graph(tmp_path / "out"), np.random.default_rng(1).integers(0, 300, (1, 6))
    mask = np.array([[0, 0, 1, 1, 1, 1]])
    padded, _ = graph.run(ids, mask=mask)
    assert relative(padded, graph.run(ids)[0]) > 1e-2
    assert relative(padded, graph.run(ids[:, 2:])[0]) < 1e-5


def test_keys_and_values_are_never_repeated(tmp_path: Path) -> None:
    """Grouped queries meet the cache as it is: no value of the graph has a key of every query head."""
    import onnx

    folder = folder_of(tmp_path, "llama-one-kv")
    export(folder, tmp_path / "out", target="trt", verify=False)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output)
    }
    grown = [name for name, shape in shapes.items() if "total" in shape and 16 in shape and 4 in shape]
    assert shapes["present.0.key"] == ["batch", 1, "total", 16] and not grown


def test_memory_of_both_dialects_can_be_predicted(tmp_path: Path) -> None:
    from mixt_export.verification import predict_memory

    folder = folder_of(tmp_path, "qwen3")
    needs = {}
    for jetpack in JETPACKS:
        out = tmp_path / str(jetpack)
        export(folder, out, target="trt", dtype="fp16", verify=False, trt=TrtOptions(jetpack=jetpack))
        needs[jetpack] = predict_memory(out, batch=2, seq=8, total=40)
    scores = 2 * 4 * 8 * 40 * 4
    assert needs[6].activations > scores  # written out, scores are values of the graph
    assert needs[7].activations < needs[6].activations and needs[7].workspace == scores
