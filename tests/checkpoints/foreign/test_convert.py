"""mixt convert: folders that other tools load, ours from any other, and round trips through both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mixt_export.checkpoints import Checkpoint, open_checkpoint
from mixt_export.checkpoints.convert import convert
from mixt_export.cli.main import load_verb
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.network import densify
from tests.checkpoints.foreign.authors import assert_parity, dense, linears, logits, write_base
from tests.checkpoints.foreign.modules import ABLinear, UVLinear
from tests.checkpoints.foreign.test_over_base import adapter
from tests.checkpoints.foreign.test_pairs import ablinear, asvd, dobi, svd_llm
from tests.checkpoints.foreign.test_structures import basis_sharing, blast, tt_llm
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

QUERY = "model.layers.0.self_attn.q_proj"


def matrices(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    def load(name: str) -> np.ndarray:
        return checkpoint.store.read(name, "float64")

    return {name: densify(linear, load) for name, linear in checkpoint.factors.items()}


def same(one: Checkpoint, two: Checkpoint) -> None:
    """The same function: every matrix and every other tensor, bit for bit."""
    ours, theirs = matrices(one), matrices(two)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    cores = {ref.name for opened in (one, two) for linear in opened.factors.values() for ref in linear.tensors()}
    for name in set(one.store) - cores:
        assert np.array_equal(one.store.read(name), two.store.read(name)), name
    assert set(one.store) - cores == set(two.store) - cores


def loaded(folder: Path, make: Callable[..., nn.Module], key: str) -> nn.Module:
    """The written folder in the authors' modules: sizes from config.json, every tensor by its name, none left over."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"].replace("lowrank_", "").replace("svdllm-", "")
    settings = AutoConfig.for_model(family).from_dict({**config, "model_type": family})
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    for name, inner, outer, bias in list(linears(model)):
        if name in config[key]:
            given = config[key][name]
            model.set_submodule(name, make(inner, outer, given["rank"] if isinstance(given, dict) else given, bias))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("to", "make", "key", "architecture"),
    [
        ("ablinear", ABLinear, "low_rank_modules", "LowRankQwen2ForCausalLM"),
        ("svd-llm", UVLinear, "svd_ranks", "SVDLLMQwen2ForCausalLM"),
    ],
)
def test_models_made_here_load_elsewhere(
    tmp_path: Path, to: str, make: Callable[..., nn.Module], key: str, architecture: str
) -> None:
    write_tiny(tmp_path / "base", "qwen2", num_hidden_layers=2)
    source = write_tiny_low_rank(tmp_path / "model", tmp_path / "base", {"q_proj": 5, "down_proj": 9})
    convert(source, tmp_path / "out", to)
    model = loaded(tmp_path / "out", make, key)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [architecture]
    assert model.get_submodule("model.layers.0.self_attn.q_proj.v_proj" if to == "svd-llm" else f"{QUERY}.BLinear")
    same(open_checkpoint(source), open_checkpoint(tmp_path / "out"))
    assert_parity(tmp_path / "out", model, tmp_path / "exported", ("ort",))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("write", [ablinear, asvd, dobi, svd_llm, blast, tt_llm, basis_sharing])
def test_everything_becomes_our_own_format(tmp_path: Path, write: Any) -> None:
    folder, model = write(tmp_path / "model")
    done = convert(folder, tmp_path / "out", "mixt")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.format, len(checkpoint.factors)) == ("mixt", done.linears)
    same(open_checkpoint(folder), checkpoint)
    low_rank = [linear for linear in checkpoint.factors.values() if len(linear.branches[0].cores) == 2]
    assert all([core.labels for core in linear.branches[0].cores] == [("i", "r"), ("r", "o")] for linear in low_rank)
    if write in (dobi, basis_sharing):
        assert_parity(tmp_path / "out", model, tmp_path / "exported", ("onnx",))


def test_round_trips(tmp_path: Path) -> None:
    """Dobi-SVD → ABLinear → ours → SVD-LLM → ABLinear: the same matrices, and at the end the same files."""
    folder, _ = dobi(tmp_path / "dobi")
    steps = [folder]
    for number, to in enumerate(("ablinear", "mixt", "svd-llm", "ablinear")):
        steps.append(tmp_path / f"{number}")
        convert(steps[-2], steps[-1], to)
    for step in steps[1:]:
        same(open_checkpoint(folder), open_checkpoint(step))
    one, two = (load_file(steps[number] / "model.safetensors") for number in (1, 4))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_shared_bases_stay_shared(tmp_path: Path) -> None:
    folder, _ = basis_sharing(tmp_path / "model")
    convert(folder, tmp_path / "out", "mixt")
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    assert before.store.nbytes == after.store.nbytes


def test_adapters_are_merged_or_kept(tmp_path: Path) -> None:
    model, config = dense()
    base = write_base(tmp_path / "base", config)
    adapter(tmp_path / "lora", model, base)
    convert(tmp_path / "lora", tmp_path / "merged", "mixt")
    convert(tmp_path / "lora", tmp_path / "kept", "mixt", keep_adapter=True)
    merged, kept = open_checkpoint(tmp_path / "merged"), open_checkpoint(tmp_path / "kept")
    assert (merged.format, kept.format) == ("huggingface", "mixt")
    assert len(kept.factors[QUERY].branches) == 2
    assert_parity(tmp_path / "merged", model, tmp_path / "one", ("ort",))
    assert_parity(tmp_path / "kept", model, tmp_path / "two", ("ort",))
    with pytest.raises(UsageError, match=r"--keep-adapter: .* is no LoRA adapter"):
        convert(base, tmp_path / "other", "mixt", keep_adapter=True)


def test_what_is_no_product_of_two_matrices_is_refused(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    with pytest.raises(UnsupportedError, match="has no factorised linear"):
        convert(base, tmp_path / "out", "ablinear")
    write_tiny_mixt(tmp_path / "mixt", base, {"up_proj": 3})
    with pytest.raises(UnsupportedError, match=r"linear 'model.layers.0.mlp.up_proj' \(mixt\) is no product of two"):
        convert(tmp_path / "mixt", tmp_path / "out", "svd-llm")
    with pytest.raises(UsageError, match="--to gguf: is no format that is written; choose mixt, ablinear, svd-llm"):
        convert(base, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    source = write_tiny_low_rank(tmp_path / "model", write_tiny(tmp_path / "base"), {"q_proj": 5})
    convert(source, tmp_path / "out", "ablinear")
    with pytest.raises(UsageError, match="is not empty; pass --overwrite"):
        convert(source, tmp_path / "out", "svd-llm")
    convert(source, tmp_path / "out", "svd-llm", overwrite=True)
    assert open_checkpoint(tmp_path / "out").format == "svd-llm"
    with pytest.raises(UsageError, match="is or contains the input"):
        convert(tmp_path / "out", tmp_path / "out", "mixt", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "out"]


def run(verb: str, *arguments: object) -> int:
    result = load_verb(verb).main(args=[str(word) for word in arguments], prog_name=verb, standalone_mode=False)
    return int(result or 0)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect names the format, export proves it against PyTorch with the base model given, convert rewrites it."""
    monkeypatch.setenv("MIXT_BASE_MODEL", "")
    model, config = dense()
    base = write_base(tmp_path / "base", config)
    adapter(tmp_path / "lora", model, "hub/name")
    assert run("inspect", tmp_path / "lora", "--base", base, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "peft-lora" and "adapter_config.json, over" in report["reason"]
    assert run("export", tmp_path / "lora", "--base", base, "-o", tmp_path / "out", "--max-seq-len", 64) == 0
    assert "PASSED" in capsys.readouterr().out.upper()
    assert run("convert", tmp_path / "lora", "--base", base, "--to", "mixt", "-o", tmp_path / "whole") == 0
    assert "peft-lora → mixt, 0 factorised linears" in capsys.readouterr().out
    ids = np.arange(8)[None]
    whole = open_checkpoint(tmp_path / "whole")
    from mixt_export.reference import load_reference

    assert np.allclose(logits(load_reference(whole), ids), logits(model, ids), rtol=0, atol=1e-4)
