"""What mixtures of experts are counted as, without weights, and how folders are shown."""

from __future__ import annotations

from math import prod
from pathlib import Path

from mixt_export.accounting.compute import form_costs
from mixt_export.accounting.methods import Variant
from mixt_export.accounting.parameters import count
from mixt_export.checkpoints import open_checkpoint
from mixt_export.families import decoder_of
from mixt_export.inspection import experts_folded, inspect
from tests.moe.folders import KINDS, write_factorised
from tests.tiny import tiny_config, tiny_shapes, write_tiny

QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_parameters_and_multiply_adds_of_the_real_model() -> None:
    """30.5 billion parameters, as its page says; 8 of 128 experts multiply."""
    decoder, variant = decoder_of(QWEN3_30B), Variant("dense", "dense", {})
    found = count(decoder, variant)
    assert found.total == 30_532_122_624
    attention = 2048 * 128 * (32 + 4 + 4 + 32)
    assert form_costs(decoder, variant)["dense"].macs == 48 * (attention + 8 * 3 * 2048 * 768) + 2048 * 151936


def test_parameters_are_those_of_the_folder() -> None:
    config = tiny_config("qwen3_moe", tied=False)
    sizes = [prod(shape) for shape in tiny_shapes(config).values()]
    assert count(decoder_of(config), Variant("dense", "dense", {})).total == sum(sizes)


def test_inspect_shows_the_experts_of_a_layer_together(tmp_path: Path) -> None:
    report = inspect(write_factorised(tmp_path))
    shown = [entry for entry in report["linears"] if "experts" in entry["name"]]
    assert [entry["name"] for entry in shown[:3]] == [f"model.layers.0.mlp.experts.*.{kind}" for kind in KINDS]
    assert len(shown) == 2 * 3
    inside, outside, r_in, r_out = KINDS["gate_proj"]
    params = 6 * r_in * r_out + inside * r_in + outside * r_out
    assert (shown[0]["params"], shown[0]["shape"], shown[0]["ranks"]) == (params, [6, outside, inside], [[r_in, r_out]])
    assert report["types"]["experts.gate_proj"]["params"] == 2 * params
    assert report["types"]["gate_proj"]["count"] == 1
    total = sum(tensor.ref.size for tensor in open_checkpoint(tmp_path / "model").store.values())
    assert report["params"]["total"] == total


def test_inspect_of_dense_experts(tmp_path: Path) -> None:
    report = inspect(write_tiny(tmp_path / "model", "qwen3_moe"))
    (entry,) = [entry for entry in report["linears"] if entry["name"] == "model.layers.2.mlp.experts.*.down_proj"]
    assert (entry["method"], entry["factorised"], entry["share"], entry["params"]) == ("dense", False, 1.0, 6 * 48 * 40)


def test_what_a_manifest_says_of_experts_is_folded() -> None:
    described = {
        "model.layers.0.self_attn.q_proj": {"form": "dense"},
        "model.layers.0.mlp.experts.0.up_proj": {"form": "dense", "params": 5},
        "model.layers.0.mlp.experts.1.up_proj": {"form": "LowRankLinear", "params": 5},
        "model.layers.0.mlp.experts.10.up_proj": {"form": "dense", "params": 5},
    }
    assert experts_folded(described) == {
        "model.layers.0.self_attn.q_proj": {"form": "dense"},
        "model.layers.0.mlp.experts.*.up_proj": {"params": 5, "experts": 3},
    }
