"""Gemma 3, text: sandwich norms, norms on queries and keys, windows in five of six layers with a rope of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.config import Config, flag, number, optional_number, size
from mixt_export.families.gated import gated_attention, layer_kinds
from mixt_export.families.gemma import (
    gemma_around,
    gemma_eps,
    gemma_norm,
    gemma_sizes,
    refuse_bidirectional,
    sandwich_block,
)
from mixt_export.families.rope import rope_of
from mixt_export.families.wiring import Block, Decoder, Rope

#: Kind of layer -> the old spelling's key of its base frequency, and the default.
_THETA = {"full_attention": ("rope_theta", 1_000_000.0), "sliding_attention": ("rope_local_base_freq", 10_000.0)}


def decoder(config: Config) -> Decoder:
    """Wiring of a Gemma3ForCausalLM."""
    refuse_bidirectional(config)
    if config.get("attn_logit_softcapping") is not None:
        raise UnsupportedError("config.json: attn_logit_softcapping is not supported for gemma3_text; no model has it.")
    sizes, eps, bias = gemma_sizes(config), gemma_eps(config), flag(config, "attention_bias")
    scale = number(config, "query_pre_attn_scalar", 256) ** -0.5
    window = size(config, "sliding_window", 4096)
    kinds = layer_kinds(config, sizes.layers, pattern=size(config, "sliding_window_pattern", 6))
    ropes = {kind: _rope(config, kind, sizes.head_dim) for kind in _THETA}

    def block(index: int) -> Block:
        prefix, kind = f"model.layers.{index}", kinds[index]
        attention = replace(
            gated_attention(sizes, prefix, ropes[kind], qkv_bias=bias, o_bias=bias),
            scale=scale,
            window=window if kind == "sliding_attention" else None,
            q_norm=gemma_norm(f"{prefix}.self_attn.q_norm", eps),
            k_norm=gemma_norm(f"{prefix}.self_attn.k_norm", eps),
        )
        return sandwich_block(config, sizes, index, attention)

    plain = gemma_around(config, sizes, block)
    return replace(plain, logit_softcap=optional_number(config, "final_logit_softcapping"))


def _rope(config: Config, kind: str, head_dim: int) -> Rope:
    """Rope of the layers of ``kind``; rope_scaling, the old spelling, is of the full layers alone."""
    given = config.get("rope_parameters")
    if given is None:
        nested = config.get("rope_scaling") or {} if kind == "full_attention" else {}
    else:
        nested = given.get(kind) or {} if isinstance(given, Mapping) else None
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"config.json: rope_parameters must hold an object for {kind}.")
    key, default = _THETA[kind]
    theta = number(nested, "rope_theta") if "rope_theta" in nested else number(config, key, default)
    return rope_of(nested, config, head_dim, theta)
