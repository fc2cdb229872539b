"""Tiny models of families beyond Llama's kin, one for every branch of their wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import write_tiny

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-untied-scaled-by-layer": {
        "model_type": "gpt2",
        "tied": False,
        "scale_attn_by_inverse_layer_idx": True,
        "n_inner": None,
        "activation_function": "gelu",
    },
    "gpt2-unscaled-relu-bf16": {
        "model_type": "gpt2",
        "scale_attn_weights": False,
        "activation_function": "relu",
        "dtype": "bfloat16",
    },
    "gptj": {},
    "gptj-whole-heads-rotate": {"model_type": "gptj", "rotary_dim": 32},
    "gemma": {"attention_bias": True, "tied": False},
    "gemma2": {},
    "gemma2-without-caps": {
        "model_type": "gemma2",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 32,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "gemma3_text": {},
    "gemma3-old-spelling": {
        "model_type": "gemma3_text",
        "rope_parameters": None,
        "layer_types": None,
        "rope_theta": 500000.0,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 5.0,
    },
    "granite": {},
    "olmo2": {},
    "phi3": {},
    "smollm3": {},
    "smollm3-windows": {
        "model_type": "smollm3",
        "no_rope_layers": None,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "starcoder2": {"sliding_window": 5},
}


def folder_of(root: Path, variant: str, **more: Any) -> Path:
    options = {**VARIANTS[variant], **more}
    return write_tiny(root / "model", options.pop("model_type", variant), **options)
