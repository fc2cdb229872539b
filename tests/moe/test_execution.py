"""Experts in exported graphs: every dialect against transformers, or the reference where experts are factors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from mixt_export.errors import UnsupportedError
from mixt_export.network import build
from mixt_export.reference import load_reference
from mixt_export.targets import export, plan_export
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification.graph import open_graph
from mixt_export.verification.memory.predict import predict_memory
from mixt_export.verification.session import ExportedRunner
from tests.lower.matrix import worst
from tests.moe.folders import KINDS, td_moe, write_factorised
from tests.ortrun import relative
from tests.tiny import write_tiny

torch.set_num_threads(1)
TARGETS = ["ort", "onnx", "trt"]

VARIANTS = {
    "three-of-six": {},
    "raw-weights": {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2, "tied": False},
    "one-of-many": {"num_experts": 20, "num_experts_per_tok": 1},
    "all-of-two": {"num_experts": 2, "num_experts_per_tok": 2, "use_sliding_window": True, "sliding_window": 5},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_experts_equal_transformers(tmp_path: Path, variant: str, target: str) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3_moe", **VARIANTS[variant])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    export(folder, tmp_path / "out", target=target, max_seq_len=96, verify=False)
    assert worst(model, tmp_path / "out", left_padded=target != "ort") < 1e-5


def low_rank(name: str, kind: str) -> object:
    """Ranks that differ by expert, and an expert that stays dense."""
    expert = int(name.split(".experts.")[1].split(".")[0])
    return build.low_rank(name, *KINDS[kind][:2], 4 + expert) if expert else None


def uniform(name: str, kind: str) -> object:
    return build.low_rank(name, *KINDS[kind][:2], 6)


def three(name: str, kind: str) -> object:
    return build.tucker2(name, *KINDS[kind])


def tensor_train(name: str, kind: str) -> object:
    sites = {48: (4, 3, 4), 40: (4, 5, 2)}
    inside, outside, *_ = KINDS[kind]
    return build.tensor_train(name, sites[inside], sites[outside], (5, 3))


def one_side(name: str, kind: str) -> object:
    """Only gates and ups share, and they share their input factor with each other."""
    if kind == "down_proj":
        return None
    stem = f"{name.split('.experts.')[0]}.experts"
    return build.low_rank(name, 48, 40, 16, names=(f"{stem}.u_in", f"{name}.core"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [td_moe, uniform, three, one_side, low_rank])
def test_factorised_experts_equal_the_reference(tmp_path: Path, make: object, target: str) -> None:
    folder = write_factorised(tmp_path, make)  # type: ignore[arg-type]
    if target == "trt" and make is low_rank:
        with pytest.raises(UnsupportedError, match=r"experts\.gate_proj: TensorRT runs .* one structure and rank"):
            plan_export(folder, target=target)
        return
    export(folder, tmp_path / "out", target=target, max_seq_len=96, verify=False)
    assert worst(load_reference(folder), tmp_path / "out", left_padded=target != "ort") < 1e-5


@pytest.mark.parametrize("target", TARGETS)
def test_experts_that_are_no_product_of_matrices(tmp_path: Path, target: str) -> None:
    with pytest.raises(
        UnsupportedError, match=r"experts\.0\.gate_proj: an expert may be dense or a product of matrices"
    ):
        plan_export(write_factorised(tmp_path, tensor_train), target=target)  # type: ignore[arg-type]


def test_what_experts_share_is_computed_once(tmp_path: Path) -> None:
    """Per MoE layer: three products with an input factor, three with an output factor, one core per expert and kind."""
    folder = write_factorised(tmp_path)
    nodes = [node for node in plan_export(folder, target="onnx").lowered.model.graph if "layers.0/mlp" in node.name]
    products = [node.name.split("/mlp/")[1] for node in nodes if node.op_type == "MatMul"]
    assert [name for name in products if "shared" in name] == [
        "experts.gate_proj/shared_in/MatMul",
        "experts.up_proj/shared_in/MatMul",
        "experts.gate_proj/shared_out/MatMul",
        "experts.up_proj/shared_out/MatMul",
        "experts.down_proj/shared_in/MatMul",
        "experts.down_proj/shared_out/MatMul",
    ]
    assert sum("/core0/" in name for name in products) == 3 * 6
    rows = {node.name.split("/mlp/")[1]: str(node.outputs[0].shape[1]) for node in nodes if "shared" in node.name}
    per_token = ("experts.gate_proj/shared_in", "experts.up_proj/shared_in", "experts.down_proj/shared_out")
    assert {name for name, count in rows.items() if count == "tokens"} == {f"{name}/MatMul" for name in per_token}


def test_a_common_input_factor_of_gate_and_up_is_one_product(tmp_path: Path) -> None:
    folder = write_factorised(tmp_path, one_side)  # type: ignore[arg-type]
    nodes = [node.name for node in plan_export(folder, target="onnx").lowered.model.graph]
    assert sum("layers.0/mlp" in name and "shared_in" in name for name in nodes) == 1


@pytest.mark.parametrize("target", ["ort", "trt"])
def test_weights_of_experts_stay_where_they_are(tmp_path: Path, target: str) -> None:
    """Cores of the factorised folder lie side by side: nothing of them is copied, stacked or not."""
    plan = plan_export(write_factorised(tmp_path), target=target, max_seq_len=96)
    assert not [entry.name for entry in plan.lowered.weights.streamed if "experts" in entry.name]


@pytest.mark.parametrize("target", TARGETS)
def test_memory_is_predicted(tmp_path: Path, target: str) -> None:
    """Rows of all experts together are counted once; in a loop one expert's matrices at a time."""
    export(write_tiny(tmp_path / "m", "qwen3_moe"), tmp_path / "out", target=target, max_seq_len=96, verify=False)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    small, large = (predict_memory(model, seq=seq, total=96).activations for seq in (8, 64))
    pairs = 64 * 3 * (48 + 40) * 4
    assert small < large
    assert large >= pairs
    if target != "trt":
        assert large < 4 * pairs


@pytest.mark.parametrize("jetpack", [6, 7])
def test_experts_that_outgrow_float16(tmp_path: Path, jetpack: int) -> None:
    """Up projections of 2^15 times the size: without islands they overflow; a scan finds them and rescues the layer."""
    folder = write_tiny(tmp_path / "model", "qwen3_moe", num_hidden_layers=1, mlp_only_layers=[])
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        power = 15 if "up_proj" in name else -8 if "down_proj" in name else 0
        tensors[name] = tensors[name] * np.float32(2.0**power)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = np.random.default_rng(3).integers(0, 300, 12)
    with torch.no_grad():
        expected = load_reference(folder)(torch.tensor(ids[None])).logits[0, -1].numpy()

    def error(out: Path, scanned: bool) -> float:
        options = TrtOptions(jetpack=jetpack, scan=scanned)
        export(folder, out, target="trt", dtype="fp16", max_seq_len=96, trt=options, verify=False)
        with np.errstate(all="ignore"):
            return relative(ExportedRunner(open_graph(out), 1).full(ids).logits[0, -1], expected)

    assert not error(tmp_path / "naive", False) < 0.2, "nothing overflows without islands; the test says nothing"
    assert error(tmp_path / "rescued", True) < 2e-2
    said = json.loads((tmp_path / "rescued" / "mixt_manifest.json").read_text())["trt"]["islands"]["linears"]
    assert "model.layers.0.mlp.experts.2.up_proj" in said
