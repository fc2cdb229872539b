"""Wiring read from config.json: the tensors it names are the ones a real folder holds; contradictions are refused."""

from __future__ import annotations

import pytest

from mixt_export.errors import CheckpointError, UnsupportedError, UsageError
from mixt_export.families import FAMILIES, decoder_of
from tests import tiny_families
from tests.tiny import FAMILIES as LLAMA_LIKE
from tests.tiny import tiny_config, tiny_shapes

TINY = [*LLAMA_LIKE, *tiny_families.CONFIGS]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", TINY)
def test_names_and_shapes_are_those_of_the_checkpoint(model_type: str, tied: bool) -> None:
    config = tiny_config(model_type, tied=tied)
    decoder = decoder_of(config)
    found = {decoder.embedding: (decoder.vocab_size, decoder.hidden_size)}
    for linear in decoder.linears:
        found[f"{linear.name}.weight"] = linear.stored_shape
        if linear.bias:
            found[f"{linear.name}.bias"] = (linear.out_features,)
    if decoder.positions is not None:
        found[decoder.positions.weight] = (decoder.positions.rows, decoder.hidden_size)
    for norm in (decoder.final_norm, *(norm for block in decoder.blocks for norm in block.norms)):
        found |= {name: (decoder.hidden_size,) for name in (norm.weight, norm.bias) if name is not None}
    for attention in (block.attention for block in decoder.blocks):
        heads = ((attention.q_norm, decoder.heads), (attention.k_norm, decoder.kv_heads))
        for norm, count in ((norm, count) for norm, count in heads if norm is not None):
            found[norm.weight] = (decoder.head_dim * (count if attention.norm_all_heads else 1),)
    routers = {name: shape for name, shape in tiny_shapes(config).items() if name.endswith("mlp.gate.weight")}
    assert found | routers == dict(tiny_shapes(config))  # a router is no linear that could be factorised


def windows(config: dict[str, object]) -> list[int | None]:
    return [block.attention.window for block in decoder_of(config).blocks]


def test_windows_follow_the_layer_types() -> None:
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=2)
    assert windows(config) == [None, None, 7]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows({**config, "layer_types": kinds}) == [7, None, 7]
    mistral = tiny_config("mistral")
    del mistral["sliding_window"]
    assert windows(mistral)[0] == 4096


def test_gemma_alternates_windows_and_ropes() -> None:
    assert windows(tiny_config("gemma2")) == [5, None, 5]
    config = {**tiny_config("gemma3_text", num_hidden_layers=13), "layer_types": None}
    assert windows(config) == [5, 5, 5, 5, 5, None] * 2 + [5]
    local, everywhere = decoder_of(config).ropes
    assert (local.theta, local.kind, everywhere.theta, everywhere.kind) == (1e4, "default", 1e6, "linear")


def test_what_shapes_do_not_tell() -> None:
    gptj, gemma2 = decoder_of(tiny_config("gptj")), decoder_of(tiny_config("gemma2"))
    assert all(block.parallel and block.attention.rope.interleaved for block in gptj.blocks)
    assert gemma2.embedding_scale == 48**0.5 and gemma2.logit_softcap == 4.0
    assert [block.attention.scale for block in gemma2.blocks] == [24**-0.5] * 3
    gpt2 = decoder_of(tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True))
    assert [block.attention.scale for block in gpt2.blocks] == [0.25, 0.125, 0.25 / 3]
    assert [linear.name for linear in gpt2.blocks[1].writers] == [
        "transformer.h.1.attn.c_proj",
        "transformer.h.1.mlp.c_proj",
    ]


@pytest.mark.parametrize(
    ("model_type", "change", "error", "text"),
    [
        ("gpt2", {"add_cross_attention": True}, UnsupportedError, "add_cross_attention"),
        ("gpt2", {"n_head": 5}, CheckpointError, "n_embd 48 is not a multiple of n_head 5"),
        ("gpt2", {"activation_function": "mish"}, UnsupportedError, "activation_function = 'mish'"),
        ("gptj", {"rotary_dim": 34}, CheckpointError, "rotary_dim 34 must be an even number up to .* 32"),
        ("gptj", {"rotary_dim": 15}, CheckpointError, "rotary_dim 15"),
        ("gptj", {"tie_word_embeddings": True}, UnsupportedError, "its head has a bias"),
        ("gemma", {"hidden_act": "silu"}, UnsupportedError, "hidden_act = 'silu'"),
        ("gemma2", {"use_bidirectional_attention": True}, UnsupportedError, "use_bidirectional_attention"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, CheckpointError, "attn_logit_softcapping must be a positive"),
        ("gemma2", {"layer_types": ["full_attention"]}, CheckpointError, "layer_types has 1 entries for 3 layers"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, UnsupportedError, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": [1]}, CheckpointError, "rope_parameters must hold an object"),
        ("gemma3_text", {"model_type": "gemma3"}, UnsupportedError, "text and vision in one.*gemma3_text"),
    ],
)
def test_variants_that_are_refused(
    model_type: str, change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        decoder_of({**tiny_config(model_type), **change})


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model_type": "bloom"}, UnsupportedError, "model_type 'bloom'"),
        ({"model_type": None}, CheckpointError, "model_type is missing"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act = 'gelu'"),
        ({"hidden_size": -5}, CheckpointError, "hidden_size must be a positive integer"),
        ({"hidden_size": True}, CheckpointError, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 10**12}, CheckpointError, "num_hidden_layers"),
        ({"num_hidden_layers": 2000}, CheckpointError, "beyond any model"),
        ({"num_key_value_heads": 3}, CheckpointError, "not a multiple"),
        ({"head_dim": 7}, CheckpointError, "odd"),
        ({"rms_norm_eps": 0}, CheckpointError, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, CheckpointError, "tie_word_embeddings"),
        ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantised"),
    ],
)
def test_bad_config(change: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        decoder_of({**tiny_config(), **change})


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILIES) == set(TINY)


def test_num_layers_out_of_range() -> None:
    with pytest.raises(UsageError, match="--num-layers 4: the model has 3 layers"):
        decoder_of(tiny_config(), 4)
