"""Value projections judged behind the attention: moments and gradients against PyTorch's attention weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import Settings, compress
from mixt_export.compression.attended import HeadFisher, Value, listening_at_heads, mixed_gram, values_of
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.statistics import Gram
from mixt_export.errors import UsageError
from tests.tiny import LINEARS, write_tiny

TOKENS = np.random.default_rng(0).integers(3, 250, (3, 19))
BLOCK = 1


def attention_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of block BLOCK: its input, its weights (windows, heads, tokens, tokens) and what its value projection reads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    read: list[torch.Tensor] = []
    model.model.layers[BLOCK].self_attn.v_proj.register_forward_pre_hook(lambda _m, args: read.append(args[0]))
    with torch.no_grad():
        out = model(torch.tensor(TOKENS), output_attentions=True, output_hidden_states=True)
    return out.hidden_states[BLOCK], out.attentions[BLOCK], read[0]


@pytest.mark.parametrize(("family", "sizes"), [("qwen2", {}), ("llama", {"head_dim": 32}), ("mistral", {})])
def test_moments_are_those_of_inputs_mixed_by_each_head(tmp_path: Path, family: str, sizes: dict[str, int]) -> None:
    """Heads of 32 do not divide the 48 features."""
    folder = write_tiny(tmp_path / "model", family, **sizes)
    hidden, weights, x = attention_of(folder)
    mixed = torch.einsum("bhst,btc->bshc", weights.double(), x.double()).reshape(-1, x.shape[-1])
    model = BlockwiseModel(open_checkpoint(folder))
    found = Gram(x.shape[-1])
    with model.block(BLOCK) as layer:
        kept = layer.get_submodule("self_attn.v_proj")
        (value,) = values_of(layer, LINEARS)
        mixed_gram(model, layer, BLOCK, value, hidden, found)
        assert layer.get_submodule("self_attn.v_proj") is kept
    assert found.count == len(mixed) == TOKENS.size * value.heads
    expected = mixed.T @ mixed / len(mixed)
    assert float((found.mean() - expected).norm() / expected.norm()) < 1e-6
    plain = x.reshape(-1, x.shape[-1]).double()
    assert float((plain.T @ plain / len(plain) - expected).norm() / expected.norm()) > 0.1


def test_a_block_whose_values_are_fused_with_others_has_none(tmp_path: Path) -> None:
    model = BlockwiseModel(open_checkpoint(write_tiny(tmp_path / "model", "phi3")))
    with model.block(0) as layer:
        assert values_of(layer, ("self_attn.qkv_proj", "mlp.down_proj")) == ()


def test_gradients_are_those_where_heads_give_their_result(model: Path) -> None:
    hidden, _, _ = attention_of(model)
    blockwise = BlockwiseModel(open_checkpoint(model))
    heard: list[torch.Tensor] = []
    with blockwise.block(BLOCK) as layer:
        (value,) = values_of(layer, LINEARS)
        output = layer.get_submodule(value.output)
        kept: list[torch.Tensor] = []
        handle = output.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
        hidden.requires_grad_(True)
        with listening_at_heads(layer, [value], lambda name, g: heard.append(g) if name == value.name else None):
            out = blockwise.run(layer, BLOCK, hidden)
            (expected,) = torch.autograd.grad(out.square().sum(), kept[0], retain_graph=True)
            heard.clear()
            torch.autograd.grad(out.square().sum(), hidden)
        handle.remove()
    assert len(heard) == 1
    assert torch.equal(heard[0], expected.reshape(-1, expected.shape[-1]))


def test_gradients_of_heads_that_share_values_are_summed() -> None:
    value = Value("v", "o", heads=6, groups=2, width=4, features=9)
    rng = np.random.default_rng(1)
    pieces = [rng.standard_normal((count, 24)) for count in (5, 8)]
    fisher = HeadFisher(value)
    for piece in pieces:
        fisher.add(torch.tensor(piece, dtype=torch.float32))
    expected = np.zeros((8, 8))
    rows = np.concatenate(pieces)
    for head in range(6):
        part = slice(4 * (head // 3), 4 * (head // 3) + 4)
        own = rows[:, 4 * head : 4 * head + 4]
        expected[part, part] += own.T @ own / len(rows)
    assert np.allclose(fisher.mean().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["svd-llm", "asvd", "gfw-svd"])
def test_only_the_value_projections_become_others(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    factors: list[dict[str, np.ndarray]] = []
    for attended in (False, True):
        out = tmp_path / f"out{attended}"
        settings = Settings(windows=4, window=32, fisher_windows=2)
        compress(
            model, out, method=method, keep=0.6, ranks="uniform", attended=attended, calib=[text], settings=settings,
            evaluate=False,
        )  # fmt: skip
        found = open_checkpoint(out)
        factors.append(
            {
                name: np.concatenate([found.store.read(core.name, "float32").ravel() for core in linear.core_tensors()])
                for name, linear in found.factors.items()
            }
        )
        assert json.loads((out / "compress_report.json").read_text())["recipe"]["attended"] is attended
    plain, behind = factors
    changed = {name for name in plain if not np.array_equal(plain[name], behind[name])}
    assert changed == {name for name in plain if name.endswith("v_proj")}


@pytest.mark.parametrize("other", [{"objective": "shift-aware"}, {"update": "anchored"}])
def test_it_is_refused_where_moments_are_of_the_compressed_model(
    model: Path, text: Path, tmp_path: Path, other: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="--attended"):
        compress(model, tmp_path / "out", method="svd-llm", attended=True, calib=[text], **other)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
