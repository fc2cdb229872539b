"""Wiring read from config.json: the tensors it names are the ones a real folder holds; contradictions are refused."""

from __future__ import annotations

import pytest

from mixt_export.errors import CheckpointError, UnsupportedError, UsageError
from mixt_export.families import FAMILIES, decoder_of
from tests.tiny import tiny_config, tiny_shapes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_and_shapes_are_those_of_the_checkpoint(model_type: str, tied: bool) -> None:
    config = tiny_config(model_type, tied=tied)
    decoder = decoder_of(config)
    expected = dict(tiny_shapes(config))
    found = {decoder.embedding: (decoder.vocab_size, decoder.hidden_size), decoder.final_norm: (decoder.hidden_size,)}
    for linear in decoder.linears:
        found[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
        if linear.bias:
            found[f"{linear.name}.bias"] = (linear.out_features,)
    for block in decoder.blocks:
        found |= {block.input_norm: (decoder.hidden_size,), block.post_attention_norm: (decoder.hidden_size,)}
        found |= {norm: (decoder.head_dim,) for norm in (block.q_norm, block.k_norm) if norm is not None}
    assert found == expected


def test_windows_follow_the_layer_types() -> None:
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=2)
    assert [block.window for block in decoder_of(config).blocks] == [None, None, 7]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert [block.window for block in decoder_of({**config, "layer_types": kinds}).blocks] == [7, None, 7]
    mistral = tiny_config("mistral")
    del mistral["sliding_window"]
    assert decoder_of(mistral).blocks[0].window == 4096


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model_type": "gpt_neox"}, UnsupportedError, "model_type 'gpt_neox'"),
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


def test_num_layers_out_of_range() -> None:
    with pytest.raises(UsageError, match="--num-layers 4: the model has 3 layers"):
        decoder_of(tiny_config(), 4)
