"""Rotary tables against transformers' own, for every scaling rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.rope import cos_sin_tables, read_rope

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-given": {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 1.25,
    },
}


def config(**extra: object) -> dict[str, object]:
    base = {"hidden_size": 512, "num_attention_heads": 4, "head_dim": 128, "max_position_embeddings": 131072}
    return {**base, "rope_theta": 500000.0, **extra}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_tables_equal_transformers(scaling: str, theta: float) -> None:
    given = config(rope_scaling=SCALINGS[scaling], rope_theta=theta)
    cos, sin = cos_sin_tables(read_rope(given, 128), 9000)
    module = LlamaRotaryEmbedding(
        LlamaConfig(**{k: v if k != "rope_scaling" else v and dict(v) for k, v in given.items()})
    )
    positions = torch.arange(9000)[None]
    expected_cos, expected_sin = module(torch.zeros(1, 1, 1), positions)
    # One unit in the last place of a frequency moves the angle at position 9000 by 9000 * 2**-24 = 5e-4.
    for found, expected in ((cos, expected_cos), (sin, expected_sin)):
        error = np.abs(found - expected[0, :, :64].numpy())
        assert error[:200].max() < 2e-5
        assert error.max() < 6e-4 and np.mean(error > 1e-6) < 0.05


def test_new_spelling_is_the_same() -> None:
    old = read_rope(config(rope_scaling=SCALINGS["llama3"]), 128)
    new = read_rope(config(rope_theta=None, rope_parameters={**SCALINGS["llama3"], "rope_theta": 500000.0}), 128)
    assert old == new


def test_a_wrong_theta_is_seen() -> None:
    right, wrong = (cos_sin_tables(read_rope(config(rope_theta=t), 128), 64)[0] for t in (10000.0, 10001.0))
    assert np.abs(right - wrong).max() > 1e-5


@pytest.mark.parametrize(
    ("extra", "error", "text"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedError, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, CheckpointError, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, CheckpointError, "positive number"),
        ({"rope_scaling": "linear"}, CheckpointError, "must be an object"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
        ({"rope_theta": "big"}, CheckpointError, "rope_theta"),
    ],
)
def test_bad_rope(extra: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        read_rope(config(**extra), 128)
