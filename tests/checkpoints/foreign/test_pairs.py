"""ABLinear, ASVD, Dobi-SVD, SVD-LLM's export and unlabelled pairs: recognised, exported, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import CheckpointError, UnsupportedError
from tests.checkpoints.foreign.authors import assert_parity, dense, errors, factorise, linears, tensors_of, write_folder
from tests.checkpoints.foreign.modules import ABConv1D, ABLinear, DobiLinear, UVLinear, randomised

QUERY = "model.layers.0.self_attn.q_proj"


def ablinear(folder: Path, family: str = "llama", **extra: Any) -> tuple[Path, torch.nn.Module]:
    """As LowRankArena's exporters write it (scripts of baselines/, src/modeling)."""
    model, config = dense(family)
    make = ABConv1D if family == "gpt2" else ABLinear
    ranks = factorise(model, make, lambda name: None if name.endswith("1.mlp.up_proj") else 7)
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT2"}[family]
    config |= {
        "model_type": f"lowrank_{family}",
        "architectures": [f"LowRank{kind}ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_lowrank.LowRankConfig"},
        "low_rank_modules": {name: {"rank": rank} for name, rank in ranks.items()},
        "low_rank_method": "zero_sum_svd",
        "low_rank_schema": "ABLinear",
        "low_rank_format_version": 1,
        **extra,
    }
    return write_folder(folder, config, tensors_of(model)), model


def asvd(folder: Path, *, head: bool = False) -> tuple[Path, torch.nn.Module]:
    """As ASVD4LLM/huggingface_repos/build_asvd_repo.py writes it."""
    model, config = dense()
    ranks = factorise(model, ABLinear)
    if head:
        model.lm_head = randomised(ABLinear(48, 300, 9, False), 99)
        ranks["lm_head"] = 9
    config |= {
        "truncation_ranks": ranks,
        "architectures": ["ASVDLlamaForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_asvd_llama.ASVDLlamaConfig"},
    }
    return write_folder(folder, config, tensors_of(model)), model


def dobi(folder: Path) -> tuple[Path, torch.nn.Module]:
    """As LowRankArena's exporter of Dobi-SVD bundles writes it: model_type stays, some linears are dense."""
    model, config = dense()
    ranks = factorise(model, DobiLinear, lambda name: None if "o_proj" in name else 11)
    config |= {
        "architectures": ["DobiSVDLlamaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_dobisvd_llama.DobiSVDLlamaForCausalLM"},
        "dobi_target_modules": ranks,
    }
    return write_folder(folder, config, tensors_of(model)), model


def svd_llm(folder: Path) -> tuple[Path, torch.nn.Module]:
    """SVD-LLM in Hugging Face's layout, weights in shards of pytorch_model.bin."""
    model, config = dense()
    ranks = factorise(model, UVLinear)
    config |= {"model_type": "svdllm-llama", "architectures": ["SVDLLMLlamaForCausalLM"], "svd_ranks": ranks}
    write_folder(folder, config, None)
    tensors = list(tensors_of(model).items())
    shards = {"pytorch_model-00001-of-00002.bin": tensors[::2], "pytorch_model-00002-of-00002.bin": tensors[1::2]}
    for file, part in shards.items():
        torch.save(dict(part), folder / file)
    weight_map = {name: file for file, part in shards.items() for name, _ in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder, model


def unlabelled(folder: Path, make: type[torch.nn.Module] = DobiLinear) -> tuple[Path, torch.nn.Module]:
    """ALinear and BLinear, and a config.json that says nothing."""
    model, config = dense()
    factorise(model, make)
    return write_folder(folder, config, tensors_of(model)), model


WRITERS = {
    "ablinear": (ablinear, "low_rank_modules"),
    "asvd": (asvd, "truncation_ranks"),
    "dobi-svd": (dobi, "dobi_target_modules"),
    "svd-llm": (svd_llm, "svd_ranks"),
    "unlabelled": (unlabelled, "nothing in config.json"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_exported_models_compute_what_the_authors_modules_do(tmp_path: Path, name: str) -> None:
    write, reason = WRITERS[name]
    folder, model = write(tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == name
    assert reason in checkpoint.reason
    assert checkpoint.config["model_type"] == "llama"
    assert len(checkpoint.factors) == len(list(linears(dense()[0]))) - {"ablinear": 1, "dobi-svd": 2}.get(name, 0)
    assert_parity(folder, model, tmp_path / "out")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families_of_ablinear(tmp_path: Path, family: str) -> None:
    folder, model = ablinear(tmp_path / "model", family)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["model_type"] == family
    assert (checkpoint.factors[QUERY].bias is not None) == (family == "qwen2")
    assert_parity(folder, model, tmp_path / "out", ("onnx",))


def test_factors_of_conv1d_are_stored_in_out(tmp_path: Path) -> None:
    folder, model = ablinear(tmp_path / "model", "gpt2")
    linear = open_checkpoint(folder).factors["transformer.h.0.mlp.c_fc"]
    down, up = linear.branches[0].cores
    assert (down.labels, up.labels) == (("i", "r"), ("r", "o"))
    assert_parity(folder, model, tmp_path / "out")


def test_wrong_order_is_noticed(tmp_path: Path) -> None:
    """The comparison can fail: the same square factors read in the other order compute something else."""
    model, config = dense(num_attention_heads=3, num_key_value_heads=3)
    ranks = factorise(model, ABLinear, lambda name: 48 if "q_proj" in name else None)
    config |= {"architectures": ["DobiSVDLlamaForCausalLM"], "dobi_target_modules": ranks}
    folder = write_folder(tmp_path / "model", config, tensors_of(model))
    assert max(errors(folder, model, tmp_path / "out", ("onnx",))) > 1e-2


def test_a_factorised_head_stays_factorised_and_is_untied(tmp_path: Path) -> None:
    folder, model = asvd(tmp_path / "model", head=True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.factors["lm_head"].out_features == 300
    assert "factorised" in checkpoint.info["head"]
    assert_parity(folder, model, tmp_path / "out")


@pytest.mark.parametrize("make", [ABLinear, DobiLinear])
def test_the_order_of_unlabelled_pairs_is_that_of_their_shapes(tmp_path: Path, make: type[torch.nn.Module]) -> None:
    folder, model = unlabelled(tmp_path / "model", make)
    assert_parity(folder, model, tmp_path / "out", ("onnx",))


def square(folder: Path, **extra: Any) -> Path:
    """A folder whose only factors are square: (48, 48) twice for a 48 to 48 linear."""
    model, config = dense(num_attention_heads=3, num_key_value_heads=3)
    factorise(model, ABLinear, lambda name: 48 if "q_proj" in name else None)
    return write_folder(folder, config | extra, tensors_of(model))


def test_square_factors_are_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be told from its square factors; write low_rank_schema"):
        open_checkpoint(square(tmp_path / "model"))


def test_square_factors_with_a_class_that_says_whose(tmp_path: Path) -> None:
    folder = square(tmp_path / "model", architectures=["DobiSVDLlamaForCausalLM"])
    down, _ = open_checkpoint(folder).factors[QUERY].branches[0].cores
    assert down.tensor.name == f"{QUERY}.ALinear.weight"


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder: Path, removed: str = "", **added: torch.Tensor) -> None:
    """Remove a tensor from model.safetensors and add others."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(removed, None)
    save_file(tensors | added, path)


def ranks_of(folder: Path, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())[key]
    return found


def wrong_rank(folder: Path) -> None:
    edit(folder, low_rank_modules=ranks_of(folder, "low_rank_modules") | {QUERY: {"rank": 8}})


def wrong_features(folder: Path) -> None:
    edit(folder, hidden_size=64)


def missing_factor(folder: Path) -> None:
    change(folder, f"{QUERY}.BLinear.weight")


def unlisted(folder: Path) -> None:
    edit(folder, low_rank_modules={k: v for k, v in ranks_of(folder, "low_rank_modules").items() if k != QUERY})


def listed_but_dense(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    edit(folder, low_rank_modules=ranks_of(folder, "low_rank_modules") | {name: 5})


def doubled(folder: Path) -> None:
    change(folder, **{f"{QUERY}.weight": torch.zeros(64, 48)})


def inner_bias(folder: Path) -> None:
    change(folder, **{f"{QUERY}.BLinear.bias": torch.zeros(7)})


def two_formats(folder: Path) -> None:
    edit(folder, svd_ranks={QUERY: 7})


def other_factors(folder: Path) -> None:
    change(folder, **{"model.layers.1.mlp.up_proj.u_proj.weight": torch.zeros(104, 3)})


def no_rank(folder: Path) -> None:
    edit(folder, low_rank_modules={QUERY: "7"})


def other_schema(folder: Path) -> None:
    edit(folder, low_rank_schema="UVLinear")


def newer(folder: Path) -> None:
    edit(folder, low_rank_format_version=2)


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (wrong_rank, CheckpointError, r"\(7, 48\) and .* which do not fit rank 8 and 48 to 64 features of config.json"),
        (wrong_features, CheckpointError, r"do not fit rank 7 and \d+ to 64 features"),
        (missing_factor, CheckpointError, r"lacks its factor 'model.*q_proj.BLinear.weight'"),
        (unlisted, CheckpointError, "hold factors of 'model.*q_proj', which config.json does not list"),
        (
            listed_but_dense,
            CheckpointError,
            r"rank 5, but its factors are in no weight file \(it is stored dense\)",
        ),
        (doubled, CheckpointError, "stored both as factors and dense"),
        (inner_bias, UnsupportedError, "the first factor of .* has a bias"),
        (two_formats, CheckpointError, r"has svd_ranks \(svd-llm\) beside low_rank_modules"),
        (other_factors, CheckpointError, r"a tensor of another format \(u_proj/v_proj\)"),
        (no_rank, CheckpointError, "the rank '7', which is no whole number"),
        (other_schema, UnsupportedError, "low_rank_schema 'UVLinear'"),
        (newer, UnsupportedError, "version 2"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, spoil: Any, kind: type[Exception], message: str) -> None:
    folder, _ = ablinear(tmp_path / "model")
    spoil(folder)
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_contradicting_orders_are_refused(tmp_path: Path) -> None:
    folder, _ = unlabelled(tmp_path / "model")
    change(
        folder,
        **{
            f"{QUERY}.ALinear.weight": torch.zeros(64, 5),
            f"{QUERY}.BLinear.weight": torch.zeros(5, 48),
        },
    )
    with pytest.raises(CheckpointError, match="a folder holds one format"):
        open_checkpoint(folder)
