"""SmolLM3: Llama wiring in which every fourth layer has no positions at all (NoPE, arXiv:2305.19466)."""

from __future__ import annotations

from dataclasses import replace

from mixt_export.errors import CheckpointError
from mixt_export.families.config import Config, flag, size
from mixt_export.families.gated import gated_decoder, layer_windows
from mixt_export.families.wiring import Block, Decoder


def decoder(config: Config) -> Decoder:
    """Wiring of a SmolLM3ForCausalLM. Raises CheckpointError for a list of layers of another length."""
    bias, mlp_bias = flag(config, "attention_bias"), flag(config, "mlp_bias")
    windowed = flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    window = size(config, "sliding_window") if windowed else None
    rotary = _rotary_layers(config, size(config, "num_hidden_layers"))
    listed = layer_windows(config, window) if config.get("layer_types") is not None else None

    def window_of(layer: int) -> int | None:
        return listed(layer) if listed is not None else None if rotary[layer] else window

    plain = gated_decoder(
        config, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, kv_heads_default_to_heads=True, window_of=window_of
    )

    def positioned(block: Block) -> Block:
        return block if rotary[block.index] else replace(block, attention=replace(block.attention, rope=None))

    return replace(plain, blocks=tuple(positioned(block) for block in plain.blocks))


def _rotary_layers(config: Config, layers: int) -> list[bool]:
    """Per layer whether it rotates: ``no_rope_layers`` says 1 where it does."""
    given = config.get("no_rope_layers")
    if given is None:
        interval = size(config, "no_rope_layer_interval", 4)
        return [bool((layer + 1) % interval) for layer in range(layers)]
    if not isinstance(given, list) or len(given) != layers or not all(entry in (0, 1) for entry in given):
        raise CheckpointError(f"config.json: no_rope_layers must list 0 or 1 for each of {layers} layers.")
    return [bool(entry) for entry in given]
