"""Qwen3-MoE: Qwen3's attention; in most layers a mixture of experts instead of the MLP (arXiv:2505.09388)."""

from __future__ import annotations

from mixt_export.errors import CheckpointError
from mixt_export.families.config import Config, flag, size
from mixt_export.families.gated import gated_decoder
from mixt_export.families.wiring import Decoder, GatedMlp, Linear, MoeMlp

#: A bound on what config.json claims, as for layers.
_MOST_EXPERTS = 4096


def decoder(config: Config) -> Decoder:
    """Wiring of a Qwen3MoeForCausalLM.

    Layer i has experts unless ``mlp_only_layers`` lists it or i + 1 is no multiple of ``decoder_sparse_step``. Raises
    CheckpointError where config.json contradicts itself, such as a router that chooses more experts than there are.
    """
    bias = flag(config, "attention_bias")
    window = size(config, "sliding_window", 4096) if flag(config, "use_sliding_window") else None
    hidden, inner = size(config, "hidden_size"), size(config, "moe_intermediate_size")
    count, top_k = expert_count(config), size(config, "num_experts_per_tok", 8)
    if top_k > count:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {top_k} is more than the {count} experts of a layer; give 1 to {count}."
        )
    normalised = flag(config, "norm_topk_prob")
    dense = _dense_layers(config)
    step = size(config, "decoder_sparse_step", 1)

    def experts(layer: int) -> MoeMlp | None:
        if layer in dense or (layer + 1) % step:
            return None
        prefix = f"model.layers.{layer}.mlp"
        return MoeMlp(
            router=Linear(f"{prefix}.gate", hidden, count),
            experts=tuple(_expert(f"{prefix}.experts.{index}", hidden, inner) for index in range(count)),
            top_k=top_k,
            normalised=normalised,
        )

    return gated_decoder(
        config, qkv_bias=bias, o_bias=bias, qk_norm=True, window_of=lambda _layer: window, mlp_of=experts
    )


def expert_count(config: Config) -> int:
    """Experts of a layer: ``num_experts`` in published folders, ``num_local_experts`` as transformers 5 writes it."""
    count = size(config, "num_experts" if config.get("num_experts") is not None else "num_local_experts")
    if count > _MOST_EXPERTS:
        raise CheckpointError(f"config.json: num_experts {count} is beyond any model (at most {_MOST_EXPERTS}).")
    return count


def _dense_layers(config: Config) -> frozenset[int]:
    layers = config.get("mlp_only_layers") or []
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise CheckpointError("config.json: mlp_only_layers must list numbers of layers.")
    return frozenset(layers)


def _expert(name: str, hidden: int, inner: int) -> GatedMlp:
    return GatedMlp(
        gate=Linear(f"{name}.gate_proj", hidden, inner),
        up=Linear(f"{name}.up_proj", hidden, inner),
        down=Linear(f"{name}.down_proj", inner, hidden),
    )
