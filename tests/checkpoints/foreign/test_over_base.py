"""AA-SVD directories and LoRA adapters: put over their base model, exported, refused."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mixt_export.checkpoints import companion, open_checkpoint
from mixt_export.checkpoints.foreign import peft
from mixt_export.errors import CheckpointError, UnsupportedError, UsageError
from mixt_export.network import densify
from tests.checkpoints.foreign.authors import assert_parity, dense, factorise, linears, write_base
from tests.checkpoints.foreign.modules import ABLinear, Lora, randomised
from tests.checkpoints.foreign.test_pairs import ablinear
from tests.tiny import write_tiny_low_rank
from tests.verbs import run_verb

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXT_BASE_MODEL", raising=False)


def aa_svd(folder: Path, base: Path, family: str = "llama") -> nn.Module:
    """As AA-SVD's CompressedLinear.save and apply_compression_parallel write it: U, a transposed view V, norms.

    Biases stay those of the base model (from_path takes the dense module's).
    """
    model, config = dense(family)
    write_base(base, config)
    biases = {name: module.bias for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ranks = factorise(model, ABLinear, lambda name: None if "layers.1.mlp.up" in name else 9)
    for name in ranks:
        module: Any = model.get_submodule(name)
        module.ALinear.bias = biases[name]
        part = folder / name.replace(".", "_")
        part.mkdir(parents=True)
        torch.save(module.ALinear.weight.data, part / "U.pt")
        torch.save(module.BLinear.weight.data.t(), part / "V.pt")
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{layer}.{norm}"
            norm_module: Any = model.get_submodule(name)
            norm_module.weight.data = norm_module.weight.data * 1.3
            (folder / name.replace(".", "_")).mkdir()
            torch.save(OrderedDict(norm_module.state_dict()), folder / name.replace(".", "_") / "state_dict.pt")
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_aa_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    folder, base = tmp_path / "aa", tmp_path / "base"
    model = aa_svd(folder, base, family)
    monkeypatch.setenv("MIXT_BASE_MODEL", str(base))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "aa-svd"
    assert "U.pt and V.pt in model_layers_0_" in checkpoint.reason and str(base) in checkpoint.reason
    assert len(checkpoint.factors) == 13
    assert checkpoint.store[f"{QUERY}.V"].made is None  # the transposed view is used as it lies
    assert {path.name for path in checkpoint.companions()} >= {"tokenizer.json", "generation_config.json"}
    assert companion(folder, "tokenizer.json") == base / "tokenizer.json"
    assert_parity(folder, model, tmp_path / "out")


def test_a_norm_behind_the_last_layer_is_the_final_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, base = tmp_path / "aa", tmp_path / "base"
    aa_svd(folder, base)
    (folder / "model_layers_2_norm").mkdir()
    torch.save({"weight": torch.full((48,), 2.0)}, folder / "model_layers_2_norm" / "state_dict.pt")
    monkeypatch.setenv("MIXT_BASE_MODEL", str(base))
    assert np.all(open_checkpoint(folder).store.read("model.norm.weight") == 2.0)


def aa_missing(folder: Path) -> None:
    (folder / QUERY.replace(".", "_") / "V.pt").unlink()


def aa_rank(folder: Path) -> None:
    torch.save(torch.zeros(48, 8), folder / QUERY.replace(".", "_") / "V.pt")


def aa_features(folder: Path) -> None:
    torch.save(torch.zeros(60, 9), folder / QUERY.replace(".", "_") / "U.pt")


def aa_unknown(folder: Path) -> None:
    (folder / "model_layers_0_self_attn_q_proj").rename(folder / "model_layers_7_self_attn_q_proj")


def aa_quantised(folder: Path) -> None:
    part = folder / QUERY.replace(".", "_")
    for name in ("UK_q.pt", "VK_q.pt"):
        torch.save(torch.zeros(9, 48, dtype=torch.int8), part / name)


def aa_outside(folder: Path) -> None:
    part = folder / QUERY.replace(".", "_")
    shutil.move(part, folder.parent / "elsewhere")
    part.symlink_to(folder.parent / "elsewhere")


def aa_file_outside(folder: Path) -> None:
    path = folder / QUERY.replace(".", "_") / "U.pt"
    shutil.move(path, folder.parent / "U.pt")
    path.symlink_to(folder.parent / "U.pt")


def aa_object(folder: Path) -> None:
    torch.save([1, 2], folder / QUERY.replace(".", "_") / "U.pt")


def aa_norm(folder: Path) -> None:
    torch.save({"weight": torch.zeros(7)}, folder / "model_layers_0_input_layernorm" / "state_dict.pt")


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (aa_missing, CheckpointError, "V.pt: the file is missing; the linear 'model.*q_proj' needs both factors"),
        (aa_rank, CheckpointError, r"U \(64, 9\) and V \(48, 8\) are no factors"),
        (aa_features, CheckpointError, r"which is \(64, 48\) in"),
        (aa_unknown, CheckpointError, "is named after no module of the base model"),
        (aa_quantised, UnsupportedError, "quantised factors"),
        (aa_outside, CheckpointError, "leads out of the model folder"),
        (aa_file_outside, CheckpointError, "leads out of the model folder"),
        (aa_object, CheckpointError, "holds no matrix"),
        (aa_norm, CheckpointError, r"of shape \(7,\), the base model"),
    ],
)
def test_aa_svd_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, kind: type[Exception], message: str
) -> None:
    folder, base = tmp_path / "aa", tmp_path / "base"
    aa_svd(folder, base)
    spoil(folder)
    monkeypatch.setenv("MIXT_BASE_MODEL", str(base))
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_base_model_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "aa"
    aa_svd(folder, tmp_path / "base")
    with pytest.raises(UsageError, match="needs its base model; give the model's folder with --base"):
        open_checkpoint(folder)
    for given, message in ((tmp_path / "nowhere", "there is no such folder"), (folder, "is the folder .* itself")):
        monkeypatch.setenv("MIXT_BASE_MODEL", str(given))
        with pytest.raises(UsageError, match=message):
            open_checkpoint(folder)


def test_factors_over_a_base_are_trained_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mixt recover takes --base as the verbs that only read do."""
    folder, base, text = tmp_path / "aa", tmp_path / "base", tmp_path / "text.txt"
    aa_svd(folder, base)
    text.write_text("words of a text, again and again. " * 200, encoding="utf-8")
    arguments = [folder, "--teacher", base, "-o", tmp_path / "out", "--text", text, "--validation", text]
    arguments += ["--eval-text", text, "--steps", 1, "--batch", 1, "--window", 16, "--windows", 8]
    assert run_verb("recover", *arguments) == 2
    monkeypatch.setenv("MIXT_BASE_MODEL", "")  # restored behind the test
    assert run_verb("recover", *arguments, "--base", base) == 0
    recovered = open_checkpoint(tmp_path / "out")
    assert len(recovered.factors) == 13


@pytest.mark.parametrize("verb", ["compress", "sweep"])
def test_verbs_that_make_models_know_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """They take dense models: the factors over the base are read, and refused for what they are."""
    folder, base = tmp_path / "aa", tmp_path / "base"
    aa_svd(folder, base)
    arguments = [folder, "-o", tmp_path / "out", *(["--keep", "0.5"] if verb == "compress" else ["--n-tensors", "2"])]
    assert run_verb(verb, *arguments) == 2
    assert "needs its base model" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("MIXT_BASE_MODEL", "")
    assert run_verb(verb, *arguments, "--base", base) != 0
    assert "needs its base model" not in " ".join(capsys.readouterr().err.split())


def adapter(
    folder: Path,
    model: nn.Module,
    base: Path | str,
    *,
    fan_in_fan_out: bool = False,
    include: tuple[str, ...] = ("q_proj", "v_proj", "down_proj", "c_attn", "c_fc"),
    **settings: Any,
) -> None:
    """Put LoRA on ``model`` and write the files of PEFT's save_pretrained."""
    rank, alpha = settings.pop("r", 4), settings.get("lora_alpha", 12)
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in include and "layers." in f"{name}layers.":
            inner, outer = sizes(module)
            own = settings.get("rank_pattern", {}).get(name.partition("layers.0.")[2], rank)
            down = torch.randn(own, inner, generator=generator) / inner**0.5
            up = torch.randn(outer, own, generator=generator) / own**0.5
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            model.set_submodule(name, Lora(module, down, up, scale * rank / own))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(include),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        **settings,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def sizes(module: Any) -> tuple[int, int]:
    if type(module).__name__ == "Conv1D":
        return module.nx, module.nf
    if isinstance(module, ABLinear):
        return module.BLinear.in_features, module.ALinear.out_features
    return module.in_features, module.out_features


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_lora_over_a_dense_model(tmp_path: Path, family: str) -> None:
    model, config = dense(family)
    base = write_base(tmp_path / "base", config)
    adapter(tmp_path / "lora", model, base, fan_in_fan_out=family == "gpt2")
    checkpoint = open_checkpoint(tmp_path / "lora")
    assert (checkpoint.format, len(checkpoint.factors)) == ("peft-lora", 0)
    assert "merged into dense weights" in checkpoint.info["adapter"]
    assert_parity(tmp_path / "lora", model, tmp_path / "out")


def test_lora_kept_as_a_branch(tmp_path: Path) -> None:
    model, config = dense("qwen2")
    base = write_base(tmp_path / "base", config)
    adapter(tmp_path / "lora", model, base)
    merged = open_checkpoint(tmp_path / "lora")
    kept = peft.open(tmp_path / "lora", "adapter_config.json", keep=True)
    linear = kept.factors[QUERY]
    assert len(linear.branches) == 2 and linear.bias is not None
    assert linear.branches[1].scale == 3.0
    matrix = densify(linear, lambda name: kept.store.read(name, "float64"))
    assert np.allclose(matrix, merged.store.read(f"{QUERY}.weight", "float64"), rtol=0, atol=1e-6)
    assert f"{QUERY}.weight" not in kept.store


def test_lora_over_factors_is_one_more_branch(tmp_path: Path) -> None:
    base, model = ablinear(tmp_path / "base")
    adapter(tmp_path / "lora", model, base, use_rslora=True, include=("q_proj", "up_proj", "gate_proj"))
    checkpoint = open_checkpoint(tmp_path / "lora")
    assert [len(checkpoint.factors[name].branches) for name in (QUERY, QUERY.replace("q_", "k_"))] == [2, 1]
    assert "model.layers.1.mlp.up_proj" not in checkpoint.factors  # dense in the base: merged
    assert_parity(tmp_path / "lora", model, tmp_path / "out")


def test_lora_with_a_rank_of_its_own(tmp_path: Path) -> None:
    model, config = dense()
    base = write_base(tmp_path / "base", config)
    adapter(tmp_path / "lora", model, base, rank_pattern={"mlp.down_proj": 6}, include=("q_proj", "down_proj"))
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    settings["rank_pattern"] = {"layers.0.mlp.down_proj": 6}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    assert_parity(tmp_path / "lora", model, tmp_path / "out", ("onnx",))


def test_an_adapter_over_an_adapter_over_our_own_format(tmp_path: Path) -> None:
    model, config = dense()
    base = write_base(tmp_path / "base", config)
    write_tiny_low_rank(tmp_path / "factors", base, {"q_proj": 8})
    adapter(tmp_path / "first", dense()[0], "../factors")
    adapter(tmp_path / "second", model, "../first", lora_alpha=3)
    path = tmp_path / "second" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    factors, first, second = (open_checkpoint(tmp_path / name) for name in ("factors", "first", "second"))
    assert [folder.name for folder in second.bases] == ["first", "factors"]
    assert len(second.factors[QUERY].branches) == 3
    one, two, three = (
        densify(opened.factors[QUERY], lambda name, store=opened.store: store.read(name, "float64"))
        for opened in (factors, first, second)
    )
    # The second adapter is the first with both factors doubled and a quarter of its scale.
    assert np.allclose(three - two, two - one, rtol=0, atol=1e-6)
    assert np.abs(two - one).max() > 0.1


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"use_dora": True}, UnsupportedError, "use_dora, which is more than a LoRA adapter"),
        ({"peft_type": "IA3"}, UnsupportedError, "peft_type 'IA3'; LORA alone is read"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "'pissa', which changes the base model's weights too"),
        ({"layer_replication": [[0, 1]]}, UnsupportedError, "layer_replication"),
        ({"r": 5}, CheckpointError, "the rank 5, its factors have 4"),
        ({"lora_alpha": "12"}, CheckpointError, "lora_alpha of .* is '12'"),
        ({"lora_alpha": 10**400}, CheckpointError, "lora_alpha of .* is 1000"),
        ({"alpha_pattern": {"layers.(0|1).*": 24}}, UnsupportedError, "alpha_pattern has the regular expression"),
        ({"rank_pattern": {"^model.layers.0.self_attn.q_proj$": 5}}, CheckpointError, "the rank 5, its factors have 4"),
        ({"base_model_name_or_path": "x" * 5000}, UsageError, "is no folder here"),
        ({"base_model_name_or_path": "meta-llama/Llama-2-7b"}, UsageError, "it names 'meta-llama/Llama-2-7b'"),
        ({"base_model_name_or_path": "."}, UsageError, "is the folder .* itself"),
    ],
)
def test_adapters_that_are_refused(
    tmp_path: Path, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model, config = dense()
    adapter(tmp_path / "lora", model, write_base(tmp_path / "base", config))
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(tmp_path / "lora")
    assert "\n" not in str(caught.value)


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({f"{QUERY}.lora_A.weight": (4, 40)}, CheckpointError, "is 40 to 64 features, but this is"),
        ({f"{QUERY}.lora_A.weight": (3, 48)}, CheckpointError, r"lora_A \(3, 48\) and lora_B \(64, 4\)"),
        ({f"{QUERY}.lora_B.weight": None}, CheckpointError, "lacks lora_B.weight"),
        ({f"{QUERY}.lora_magnitude_vector": (64,)}, UnsupportedError, "no factor of a linear"),
        ({"model.embed_tokens.lora_embedding_A": (4, 300)}, UnsupportedError, "no factor of a linear"),
        ({"model.embed_tokens.weight": (300, 48)}, UnsupportedError, "which config.json ties"),
        ({"score.weight": (2, 48)}, CheckpointError, "has no such tensor; merge it with PEFT"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, tensors: dict[str, tuple[int, ...] | None], kind: type[Exception], message: str
) -> None:
    model, config = dense()
    adapter(tmp_path / "lora", model, write_base(tmp_path / "base", config))
    path = tmp_path / "lora" / "adapter_model.safetensors"
    stored = load_file(path)
    for name, shape in tensors.items():
        stored.pop(PREFIX + name, None)
        if shape is not None:
            stored[PREFIX + name] = torch.zeros(shape)
    save_file(stored, path)
    with pytest.raises(kind, match=message):
        open_checkpoint(tmp_path / "lora")


def test_whole_modules_of_an_adapter_replace_the_base_models(tmp_path: Path) -> None:
    """modules_to_save: an untied head and a norm come whole with the adapter."""
    model, config = dense(tied=False, tie_word_embeddings=False)
    base = write_base(tmp_path / "base", config)
    adapter(tmp_path / "lora", model, base, modules_to_save=["lm_head"])
    made: Any = model
    made.lm_head = randomised(nn.Linear(48, 300, bias=False), 3)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(path) | {f"{PREFIX}lm_head.weight": made.lm_head.weight.data}, path)
    assert_parity(tmp_path / "lora", model, tmp_path / "out", ("ort",))


def test_a_base_that_leads_back(tmp_path: Path) -> None:
    model, config = dense()
    write_base(tmp_path / "base", config)
    adapter(tmp_path / "first", model, "../second")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    settings = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    (tmp_path / "second" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "../first"})
    )
    with pytest.raises(CheckpointError, match="more than 4 deep"):
        open_checkpoint(tmp_path / "first")
    assert len(list(linears(dense()[0]))) == 14
