"""Models saved whole by torch.save: SVD-LLM's own files, ZS-SVD's, ASVD's and Dobi-SVD's, without their classes."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import CheckpointError, UnsupportedError
from tests.checkpoints.foreign.authors import assert_parity, dense, factorise, linears, write_folder
from tests.checkpoints.foreign.modules import ABLinear, DobiLinear, UVLinear, randomised


@pytest.fixture
def component(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The authors' module, there while a file is written and gone when it is read."""
    module = types.ModuleType("component_svd_llama")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def attention_class(component: types.ModuleType) -> type[nn.Module]:
    """As SVD_LlamaAttention names its factors, pickled under the name of a module that is not installed."""

    class SVD_LlamaAttention(nn.Module):  # noqa: N801  (the authors' name)
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            for letter in "qkvo":
                pair: Any = getattr(inner, f"{letter}_proj")
                setattr(self, f"{letter}_u_proj", pair.u_proj)
                setattr(self, f"{letter}_v_proj", pair.v_proj)
            self.rotary_emb = nn.Module()
            self.rotary_emb.register_buffer("inv_freq", torch.ones(8))

    return _published(component, SVD_LlamaAttention)


def mlp_class(component: types.ModuleType) -> type[nn.Module]:
    """As SVD_LlamaMLP names its factors; a ratio of 1 leaves down_proj dense."""

    class SVD_LlamaMLP(nn.Module):  # noqa: N801
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.ratio = [0.5, 1, 0.5]
            for name in ("gate", "up"):
                pair: Any = getattr(inner, f"{name}_proj")
                setattr(self, f"{name}_u_proj", pair.u_proj)
                setattr(self, f"{name}_v_proj", pair.v_proj)
            self.down_proj = inner.down_proj
            self.act_fn = inner.act_fn

    return _published(component, SVD_LlamaMLP)


def _published(component: types.ModuleType, kind: type[nn.Module]) -> type[nn.Module]:
    kind.__module__, kind.__qualname__ = component.__name__, kind.__name__
    setattr(component, kind.__name__, kind)
    return kind


def svd_llm(folder: Path, component: types.ModuleType, *, tied: bool = False) -> nn.Module:
    """{'model', 'tokenizer'} as SVDLLM.py saves them; returns what the model computes."""
    from transformers import AutoTokenizer

    model, config = dense(tied=tied)
    factorise(model, UVLinear, lambda name: None if "down_proj" in name else 11)
    write_folder(folder, config, None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "config.json").unlink()
    saved, _ = dense(tied=tied)
    saved.load_state_dict(model.state_dict(), strict=False)
    attention, mlp = attention_class(component), mlp_class(component)
    for layer, original in zip(saved.model.layers, model.model.layers, strict=True):
        layer.self_attn, layer.mlp = attention(original.self_attn), mlp(original.mlp)
    saved.seqlen = 2048
    torch.save({"model": saved, "tokenizer": tokenizer}, folder / "llama_whitening_only_0.8.pt")
    sys.modules.pop(component.__name__)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_svd_llm(tmp_path: Path, component: types.ModuleType, tied: bool) -> None:
    folder = tmp_path / "model"
    model = svd_llm(folder, component, tied=tied)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "pickled"
    assert "llama_whitening_only_0.8.pt and no other weights (svd-llm)" in checkpoint.reason
    assert checkpoint.config["model_type"] == "llama"
    assert len(checkpoint.factors) == 12
    assert not any("rotary" in name for name in checkpoint.store)
    assert ("lm_head.weight" in checkpoint.store) != tied
    assert component.__name__ not in sys.modules
    assert_parity(folder, model, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "name", "method"),
    [
        (UVLinear, "LowRankLinear", "svd-llm"),
        (ABLinear, "SVDLinear", "asvd"),
        (DobiLinear, "SVDTransformLayer", "dobi-svd"),
    ],
)
def test_other_modules(
    tmp_path: Path, component: types.ModuleType, make: type[nn.Module], name: str, method: str
) -> None:
    """Zero-Sum-SVD, ASVD and Dobi-SVD bundles; a square Dobi layer is told by its class."""
    kind = _published(component, type(name, (make,), {}))
    model, config = dense(num_attention_heads=3, num_key_value_heads=3)
    factorise(model, kind, lambda linear: 48 if method == "dobi-svd" and "q_proj" in linear else 11)
    write_folder(tmp_path / "model", config, None)
    torch.save({"model": model, "tokenizer": None}, tmp_path / "model" / "model.pt")
    sys.modules.pop(component.__name__)
    assert {linear.method for linear in open_checkpoint(tmp_path / "model").factors.values()} == {method}
    assert_parity(tmp_path / "model", model, tmp_path / "out", ("onnx",))


def test_a_state_dict_with_its_configuration_beside_it(tmp_path: Path) -> None:
    model, config = dense(tied=False)
    folder = write_folder(tmp_path / "model", config, None)
    torch.save(model.state_dict(), folder / "weights.pt")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, len(checkpoint.factors)) == ("pickled", 0)
    assert_parity(folder, model, tmp_path / "out", ("ort",))


def test_a_state_dict_needs_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = dense()
    base = write_folder(tmp_path / "base", config, None)
    (tmp_path / "model").mkdir()
    torch.save(model.state_dict(), tmp_path / "model" / "weights.pt")
    monkeypatch.delenv("MIXT_BASE_MODEL", raising=False)
    with pytest.raises(CheckpointError, match=r"put the model's config\.json beside it, or give .* with --base"):
        open_checkpoint(tmp_path / "model")
    monkeypatch.setenv("MIXT_BASE_MODEL", str(base))
    opened = open_checkpoint(tmp_path / "model")
    assert {path.name for path in opened.companions()} >= {"tokenizer.json"}


def test_what_is_no_model(tmp_path: Path) -> None:
    model, config = dense()
    folder = write_folder(tmp_path / "model", config, None)
    torch.save([torch.zeros(3)], folder / "a.pt")
    with pytest.raises(UnsupportedError, match="neither a torch module nor a state_dict"):
        open_checkpoint(folder)
    torch.save(model.state_dict(), folder / "b.pt")
    with pytest.raises(CheckpointError, match=r"holds 2 files of torch.save \(a\.pt, b\.pt\)"):
        open_checkpoint(folder)


def test_a_missing_factor_and_a_mixture(tmp_path: Path) -> None:
    model, config = dense()
    factorise(model, UVLinear)
    folder = write_folder(tmp_path / "model", config, None)
    state = dict(model.state_dict())
    path, query = folder / "weights.pt", "model.layers.0.self_attn.q_proj"
    torch.save({name: tensor for name, tensor in state.items() if name != f"{query}.v_proj.weight"}, path)
    with pytest.raises(CheckpointError, match=rf"lacks its factor '{query}\.v_proj\.weight'"):
        open_checkpoint(folder)
    torch.save(state | {f"{query}.ALinear.weight": torch.zeros(64, 3)}, path)
    with pytest.raises(CheckpointError, match="a tensor of another format"):
        open_checkpoint(folder)


def test_a_module_that_is_its_own_child(tmp_path: Path) -> None:
    """A tree without an end is refused, not followed."""
    _, config = dense()
    folder = write_folder(tmp_path / "model", config, None)
    loop = nn.Linear(2, 2)
    loop._modules["again"], loop._modules["twice"] = loop, loop
    torch.save({"model": loop}, folder / "loop.pt")
    with pytest.raises(CheckpointError, match="nested without end"):
        open_checkpoint(folder)
    assert randomised(nn.Linear(2, 2), 0) is not None
    assert len(list(linears(dense()[0]))) == 14
