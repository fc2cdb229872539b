"""load_reference against transformers' own loading, and against densified weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.errors import CheckpointError, UnsupportedError, UsageError
from mixt_export.network import FactorizedLinear, build, densify
from mixt_export.reference import load_reference
from tests.tiny import FAMILIES, write_tiny, write_tiny_low_rank

TOKENS = torch.arange(34).reshape(2, 17) * 7 % 256


def theirs(folder: Path, dtype: torch.dtype = torch.float32, attn: str = "eager") -> torch.Tensor:
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn)
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def ours(folder: Path, dtype: str = "float32", attn: str = "eager") -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_reference(folder, dtype=dtype, attn=attn)(TOKENS).logits
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_folders_load_as_transformers_loads_them(tmp_path: Path, family: str, tied: bool) -> None:
    folder = write_tiny(tmp_path / "m", family, tied=tied)
    assert torch.equal(ours(folder), theirs(folder))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_shards_and_sdpa(tmp_path: Path, dtype: str) -> None:
    folder = write_tiny(tmp_path / "m", "qwen3", dtype=dtype, shards=3)
    for kind in ("float32", dtype):
        assert torch.equal(ours(folder, kind, "sdpa"), theirs(folder, getattr(torch, kind), "sdpa"))


def test_float64_and_rope_scaling(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = write_tiny(tmp_path / "m", "llama", rope_scaling=scaling)
    plain = write_tiny(tmp_path / "p", "llama")
    assert torch.equal(ours(folder), theirs(folder))
    assert not torch.allclose(ours(folder), ours(plain), atol=1e-3)
    wide = ours(folder, "float64")
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), ours(folder), rtol=1e-4, atol=1e-4)


def densified(folder: Path, output: Path) -> Path:
    """The dense folder with the same weights, multiplied out in float64."""
    checkpoint = open_checkpoint(folder)
    tensors = [
        NewTensor(
            f"{name}.weight",
            "float32",
            (linear.out_features, linear.in_features),
            lambda linear=linear: densify(linear, checkpoint.store.read).astype(np.float32),
        )
        for name, linear in checkpoint.factors.items()
    ]
    output.mkdir()
    write_checkpoint(output, checkpoint, tensors, {}, {})
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_folders_compute_the_densified_model(tmp_path: Path, family: str) -> None:
    base = write_tiny(tmp_path / "base", family)
    folder = write_tiny_low_rank(tmp_path / "low", base, {"q_proj": 5, "v_proj": 3, "gate_proj": 9, "down_proj": 7})
    torch.testing.assert_close(ours(folder), theirs(densified(folder, tmp_path / "dense")), rtol=1e-4, atol=1e-4)


def networks(base: Path) -> dict[str, FactorizedLinear]:
    store = open_checkpoint(base).store
    attention, mlp = "model.layers.1.self_attn.", "model.layers.0.mlp."
    width = store[f"{attention}q_proj.bias"].ref.size
    query = build.tensor_train(f"{attention}q_proj", (6, 8), (4, width // 4), (5,))
    return {
        f"{attention}q_proj": replace(query, bias=store[f"{attention}q_proj.bias"].ref),
        f"{attention}o_proj": build.tucker2(f"{attention}o_proj", width, 48, 7, 5),
        f"{mlp}gate_proj": build.mixt(f"{mlp}gate_proj", 48, 104, 3),
        f"{mlp}up_proj": build.with_sparse(build.low_rank(f"{mlp}up_proj", 48, 104, 4), 33),
        f"{mlp}down_proj": build.mixt(f"{mlp}down_proj", 104, 48, 3, paper_padding=True),
    }


def test_other_networks_compute_the_densified_model(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "qwen2")
    source, factors = open_checkpoint(base), networks(base)
    rng = np.random.default_rng(5)
    tensors = []
    for linear in factors.values():
        for ref in linear.tensors():
            if ref.name in source.store:
                continue
            high = linear.out_features if ref.name.endswith("rows") else linear.in_features
            value = (
                rng.integers(0, high, ref.shape)
                if ref.dtype.startswith("int")
                else rng.standard_normal(ref.shape) / np.sqrt(ref.shape[0])
            )
            tensors.append(NewTensor(ref.name, ref.dtype, ref.shape, lambda v=value, r=ref: v.astype(r.dtype)))
    folder = tmp_path / "factorised"
    folder.mkdir()
    write_checkpoint(folder, source, tensors, factors, {})
    found = ours(folder)
    torch.testing.assert_close(found, theirs(densified(folder, tmp_path / "dense")), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, ours(base), atol=1e-2)


def edit(folder: Path, change: dict[str, np.ndarray | None]) -> Path:
    """Rewrite model.safetensors with tensors replaced, added, or (None) removed."""
    tensors = load_file(folder / "model.safetensors")
    tensors.update({name: value for name, value in change.items() if value is not None})
    for name, value in change.items():
        if value is None:
            del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": None}, "model.norm.weight"),
        ({"model.layers.3.mlp.up_proj.weight": np.zeros((104, 48), np.float32)}, "not part of"),
        ({"model.norm.weight": np.zeros(47, np.float32)}, "shape"),
        ({"lm_head.weight": np.ones((300, 48), np.float32)}, "tie_word_embeddings"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, np.ndarray], words: str) -> None:
    folder = edit(write_tiny(tmp_path / "m"), change)
    with pytest.raises(CheckpointError, match=words):
        load_reference(folder)


def test_a_tied_head_that_is_stored_too_and_old_rotary_buffers_are_accepted(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    expected = ours(folder)
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)})
    assert torch.equal(ours(folder), expected)


def test_a_factorised_linear_must_fit_the_config(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    folder = write_tiny_low_rank(tmp_path / "low", base, {"gate_proj": 4})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2"):
        load_reference(folder)


@pytest.mark.parametrize("model_type", ["no_such_model", "vit"])
def test_unknown_model_types_are_unsupported(tmp_path: Path, model_type: str) -> None:
    folder = write_tiny(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(UnsupportedError, match="causal language model"):
        load_reference(folder)


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    load_reference(folder)
    assert not (tmp_path / "ran").exists()


def test_options_are_checked(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    with pytest.raises(UsageError, match="int8"):
        load_reference(folder, dtype="int8")
    with pytest.raises(UsageError, match="flash"):
        load_reference(folder, attn="flash")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError):
        load_reference(folder)
