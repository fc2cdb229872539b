"""BLAST, TT-LLM and Basis Sharing: recognised, exported, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import CheckpointError, UnsupportedError
from tests.checkpoints.foreign.authors import assert_parity, dense, linears, tensors_of, write_folder
from tests.checkpoints.foreign.modules import BlastLinear, Shared, TTLinear, randomised
from tests.checkpoints.foreign.test_pairs import change, edit

QUERY = "model.layers.0.self_attn.q_proj"
RANKS = {"q_proj": 5, "k_proj": 4, "v_proj": 4, "o_proj": 5, "gate_proj": 6, "up_proj": 6, "down_proj": 6}
#: Modes of each size of the tiny model, three sites.
MODES = {48: (3, 4, 4), 64: (4, 4, 4), 32: (2, 4, 4), 104: (2, 4, 13)}


def blast(folder: Path, blocks: Any = 2) -> tuple[Path, nn.Module]:
    """As BLAST's BlastModelForCausalLM.save_pretrained writes it: layer 1 alone is factorised."""
    model, config = dense()
    rows, columns = blocks if isinstance(blocks, tuple) else (blocks, blocks)
    for seed, (name, inner, outer, bias) in enumerate(list(linears(model))):
        if "layers.1." in name:
            made = BlastLinear(inner, outer, RANKS[name.rpartition(".")[2]], bias, (rows, columns))
            model.set_submodule(name, randomised(made, seed))
    config |= {
        "model_type": "blast_llama",
        "architectures": ["BlastModelForCausalLM"],
        "blast_rank": RANKS,
        "blast_num_blocks": [[rows, columns]] if rows != columns else [rows],
        "target_modules": list(RANKS),
        "indices": [1],
        "precompute_matrix": False,
    }
    return write_folder(folder, config, tensors_of(model)), model


def tt_llm(folder: Path, family: str = "llama") -> tuple[Path, nn.Module]:
    """As TT-LLM's replace_llama_ffn_with_tt leaves a model, saved by save_pretrained."""
    model, config = dense(family)
    for seed, (name, inner, outer, bias) in enumerate(list(linears(model))):
        if ".mlp." in name or family == "qwen2":
            model.set_submodule(name, randomised(TTLinear(MODES[inner], MODES[outer], (5, 3), bias), seed))
    return write_folder(folder, config, tensors_of(model)), model


def basis_sharing(folder: Path, family: str = "llama", *, pickled: bool = True) -> tuple[Path, nn.Module]:
    """As Basis_Sharing's ShareLlamaForCausalLM.save_pretrained(safe_serialization=False) writes it.

    The bases are modules of the inner model by layer, and again submodules of each layer; the coefficient is the
    linear's weight. As safetensors (a conversion) a shared tensor keeps one name.
    """
    overrides = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}
    model, config = dense(family, **overrides)
    kinds = (
        {"attn": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
        if family == "gpt2"
        else {kind: f"self_attn.{kind}_proj" for kind in "qkvo"}
        | {kind: f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
    )
    inner_model, layers = ("transformer", "transformer.h") if family == "gpt2" else ("model", "model.layers")
    sizes = {name: (inner, outer, bias) for name, inner, outer, bias in linears(model)}
    tensors = tensors_of(model)
    for seed, (kind, path) in enumerate(kinds.items()):
        groups = [[0, 1], [2]] if kind not in ("o", "down") else [[0], [1], [2]]
        config |= {f"{kind}_groups": groups, f"num_basis_{kind}": 9 + seed}
        for group in groups:
            inner, outer, bias = sizes[f"{layers}.{group[0]}.{path}"]
            basis = randomised(nn.Linear(inner, 9 + seed, bias=False), 100 * seed + group[0])
            for layer in group:
                name = f"{layers}.{layer}.{path}"
                coefficient = randomised(nn.Linear(9 + seed, outer, bias=bias), 100 * seed + 10 + layer)
                model.set_submodule(name, Shared(basis, coefficient))
                tensors[f"{name}.weight"] = coefficient.weight.data
                if bias:
                    tensors[f"{name}.bias"] = coefficient.bias.data
                if pickled or layer == group[0]:
                    tensors[f"{inner_model}.{kind}_basis.{layer}.weight"] = basis.weight.data
                if pickled and family != "gpt2":
                    module = path.partition(".")[0]
                    tensors[f"{layers}.{layer}.{module}.{kind}_basis.weight"] = basis.weight.data
    config["architectures"] = [f"Share{'GPT2LMHeadModel' if family == 'gpt2' else 'LlamaForCausalLM'}"]
    write_folder(folder, config, None if pickled else tensors)
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder, model


@pytest.mark.parametrize("blocks", [2, (8, 4)])
def test_blast(tmp_path: Path, blocks: Any) -> None:
    folder, model = blast(tmp_path / "model", blocks)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.config["model_type"]) == ("blast", "llama")
    assert len(checkpoint.factors) == 7
    assert "blast_rank" not in checkpoint.config and "indices" not in checkpoint.config
    assert_parity(folder, model, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tensor_trains(tmp_path: Path, family: str) -> None:
    folder, model = tt_llm(tmp_path / "model", family)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "tt-llm"
    assert "tt_cores.0" in checkpoint.reason
    assert_parity(folder, model, tmp_path / "out")


def test_shared_bases_are_one_tensor(tmp_path: Path) -> None:
    folder, model = basis_sharing(tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    first, second, third = (
        checkpoint.factors[f"model.layers.{layer}.self_attn.q_proj"].branches[0].cores[0].tensor for layer in range(3)
    )
    assert first == second != third
    assert sum("_basis" in name for name in checkpoint.store) == 2 * 5 + 3 * 2
    assert not any(key.startswith("num_basis_") or key.endswith("_groups") for key in checkpoint.config)
    assert_parity(folder, model, tmp_path / "out")


@pytest.mark.parametrize(("family", "pickled"), [("llama", False), ("gpt2", True)])
def test_shared_bases_elsewhere(tmp_path: Path, family: str, pickled: bool) -> None:
    folder, model = basis_sharing(tmp_path / "model", family, pickled=pickled)
    assert_parity(folder, model, tmp_path / "out", ("onnx",))


def blast_shape(folder: Path) -> None:
    change(folder, **{"model.layers.1.self_attn.q_proj.D": torch.zeros(2, 2, 9)})


def blast_rank(folder: Path) -> None:
    edit(folder, blast_rank=RANKS | {"q_proj": 6})


def blast_missing(folder: Path) -> None:
    change(folder, "model.layers.1.self_attn.q_proj.C")


def blast_mixed(folder: Path) -> None:
    change(folder, **{f"{QUERY}.ALinear.weight": torch.zeros(64, 5)})


def blast_doubled(folder: Path) -> None:
    change(folder, **{"model.layers.1.self_attn.q_proj.weight": torch.zeros(64, 48)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (blast_shape, r"D \(2, 2, 9\), which do not fit"),
        (blast_rank, "blast_rank of 'model.layers.1.self_attn.q_proj' is 6, its factors say 5"),
        (blast_missing, "lacks model.layers.1.self_attn.q_proj.C"),
        (blast_mixed, r"a tensor of another format \(ALinear/BLinear\)"),
        (blast_doubled, "stored both as factors and dense"),
    ],
)
def test_blast_that_does_not_fit(tmp_path: Path, spoil: Any, message: str) -> None:
    folder, _ = blast(tmp_path / "model")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_trains_that_do_not_fit(tmp_path: Path) -> None:
    folder, _ = tt_llm(tmp_path / "model")
    core = "model.layers.0.mlp.up_proj.tt_cores.1"
    whole = load_file(folder / "model.safetensors")
    change(folder, core)
    with pytest.raises(CheckpointError, match=f"lacks {core}"):
        open_checkpoint(folder)
    save_file(whole | {core: torch.zeros(5, 4, 4, 4)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="which do not fit one another"):
        open_checkpoint(folder)
    save_file(whole | {"model.layers.0.mlp.up_proj.weight": torch.zeros(104, 48)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="as a tensor train and dense"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_basis_q": 8}, CheckpointError, r"do not fit num_basis_q 8 and 48 to 64 features"),
        ({"q_groups": [[0, 1]]}, CheckpointError, "belongs to no group"),
        ({"q_groups": [[0, 1], [1, 2]]}, CheckpointError, "names layer 1 more than once"),
        ({"q_groups": [[0, 1], [2, 3]]}, CheckpointError, "'model.layers.3.self_attn.q_proj' lacks"),
        ({"q_groups": "all"}, CheckpointError, "must list groups of layers"),
        ({"num_basis_x": 8, "x_groups": [[0]]}, CheckpointError, "num_basis_x is no type of linear"),
        ({"model_type": "opt"}, UnsupportedError, "shared bases of model_type 'opt' are not read"),
    ],
)
def test_bases_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    folder, _ = basis_sharing(tmp_path / "model")
    edit(folder, **changes)
    with pytest.raises(kind, match=message):
        open_checkpoint(folder)


def test_a_missing_coefficient(tmp_path: Path) -> None:
    folder, _ = basis_sharing(tmp_path / "model", pickled=False)
    change(folder, f"{QUERY}.weight")
    with pytest.raises(CheckpointError, match=f"lacks {QUERY}.weight"):
        open_checkpoint(folder)
    assert json.loads((folder / "config.json").read_text())["num_basis_q"] == 9
