"""Qwen3-MoE read from disk: both layouts of its experts, its config.json, and PyTorch's execution of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import CheckpointError
from mixt_export.families import decoder_of
from mixt_export.families.wiring import GatedMlp, MoeMlp
from mixt_export.reference import load_reference
from tests.moe.folders import stacked
from tests.ortrun import relative
from tests.tiny import tiny_config, write_tiny

torch.set_num_threads(1)


def kinds(config: dict[str, object]) -> list[type]:
    return [type(block.mlp) for block in decoder_of(config).blocks]


def test_which_layers_have_experts() -> None:
    assert kinds(tiny_config("qwen3_moe")) == [MoeMlp, GatedMlp, MoeMlp]
    assert kinds(tiny_config("qwen3_moe", mlp_only_layers=None)) == [MoeMlp] * 3
    assert kinds(tiny_config("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2)) == [GatedMlp, MoeMlp, GatedMlp]
    assert kinds(tiny_config("qwen3_moe", mlp_only_layers=[1], decoder_sparse_step=2)) == [GatedMlp] * 3


def test_the_number_of_experts_under_either_key() -> None:
    config = tiny_config("qwen3_moe")
    config["num_local_experts"] = config.pop("num_experts")
    mlp = decoder_of(config).blocks[0].mlp
    assert isinstance(mlp, MoeMlp)
    assert (len(mlp.experts), mlp.top_k, mlp.router.out_features) == (6, 3, 6)
    assert [linear.name for linear in mlp.linears[5:8]] == [
        "model.layers.0.mlp.experts.5.gate_proj",
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.mlp.experts.1.up_proj",
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than the 6 experts"),
        ({"num_experts": None}, "num_local_experts is missing"),
        ({"num_experts": 10**6}, "num_experts 1000000 is beyond any model"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers must list numbers"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
    ],
)
def test_bad_config(change: dict[str, object], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        decoder_of({**tiny_config("qwen3_moe"), **change})


def test_too_many_experts_per_token_in_pytorch(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3_moe")
    config = (folder / "config.json").read_text().replace('"num_experts_per_tok": 3', '"num_experts_per_tok": 9')
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 9, but a layer has 6 experts"):
        load_reference(folder)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_equals_transformers_in_both_layouts(tmp_path: Path, normalised: bool, dtype: str) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3_moe", dtype=dtype, norm_topk_prob=normalised, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor(np.random.default_rng(1).integers(0, 300, (2, 13)))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
        single = load_reference(folder)(ids).logits.numpy()
        both = load_reference(stacked(tmp_path / "stacked", folder))(ids).logits.numpy()
    assert relative(single, expected) < 1e-6
    assert np.array_equal(single, both)


def test_stacked_experts_are_pieces_of_the_file(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3_moe")
    single, pieces = open_checkpoint(folder).store, open_checkpoint(stacked(tmp_path / "stacked", folder)).store
    assert set(single) == set(pieces)
    for name in single:
        assert np.array_equal(single.read(name), pieces.read(name)), name
    assert sum(tensor.nbytes for tensor in pieces.values()) == single.nbytes


def _change(folder: Path, name: str, make: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = make(tensors.get(name))  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_stacks_that_are_none(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "model", "qwen3_moe")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    odd = stacked(tmp_path / "odd", base)
    _change(odd, name, lambda stack: np.ascontiguousarray(stack[:, :-1]))
    with pytest.raises(CheckpointError, match=r"shape \[6, 79, 48\]; a stack of experts has three axes"):
        open_checkpoint(odd)
    flat = stacked(tmp_path / "flat", base)
    _change(flat, name, lambda stack: stack[0])
    with pytest.raises(CheckpointError, match="three axes"):
        open_checkpoint(flat)
    twice = stacked(tmp_path / "twice", base)
    _change(twice, "model.layers.0.mlp.experts.3.up_proj.weight", lambda _: np.zeros((40, 48), np.float32))
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight' is stored both alone and in a stack"):
        open_checkpoint(twice)


def test_an_expert_of_another_shape(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3_moe")
    _change(folder, "model.layers.2.mlp.experts.4.down_proj.weight", lambda old: np.ascontiguousarray(old[:, :32]))
    with pytest.raises(
        CheckpointError, match=r"experts\.4\.down_proj\.weight' has shape \(48, 32\).* asks for \(48, 40\)"
    ):
        load_reference(folder)
    from mixt_export.targets import plan_export

    with pytest.raises(
        CheckpointError, match=r"experts\.4\.down_proj\.weight' has shape \[48, 32\], config.json wants"
    ):
        plan_export(folder)
