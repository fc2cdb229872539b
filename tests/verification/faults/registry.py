"""Every kind of fault: what it is, which function puts it there, where verify must find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.verification.faults import of_files, of_graph, of_weights
from tests.verification.faults.exported import Exported

EMBEDDINGS = "embeddings"
AFTER = "final norm, last position or output projection"
LAYER = "the layer"
FIRST = "the first layer"
FILES = "files"
ANY = "any"


@dataclass(frozen=True)
class Kind:
    """``where``: what verify must name; ``part``: how its naming of the part begins, where it can be told.

    ``case``: a small model of `cases` that has what the fault breaks.
    """

    name: str
    inject: Callable[[Exported, int], None]
    where: str
    case: str
    part: str = ""


def _kinds(
    where: str, *entries: tuple[Callable[[Exported, int], None], str] | tuple[Callable[[Exported, int], None], str, str]
) -> list[Kind]:
    return [
        Kind(entry[0].__name__.replace("_", " "), entry[0], where, entry[1], *(entry[2:3]))  # type: ignore[arg-type]
        for entry in entries
    ]


_W, _G, _F = of_weights, of_graph, of_files

KINDS = (
    *_kinds(
        LAYER,
        (_W.swapped_cores, "low-rank ort", "mlp.gate_proj"),
        (_W.transposed_core, "low-rank ort", "mlp.up_proj"),
        (_W.lost_average, "mixt ort", "mlp.up_proj"),
        (_W.rank_slice_off_by_one, "low-rank onnx", "mlp.up_proj"),
        (_W.rank_channel_zeroed, "low-rank onnx", "mlp.up_proj"),
        (_W.flipped_sign, "low-rank ort", "mlp.up_proj"),
        (_W.dropped_bias, "qwen2 onnx", "self_attn.q_proj"),
        (_W.norm_plus_one_forgotten, "gemma2 onnx", "input_layernorm"),
        (_W.norm_weights_off, "gpt2 ort", "ln_1"),
        (_W.permuted_query_heads, "llama ort", "self_attn.q_proj"),
        (_W.permuted_key_heads, "llama onnx", "self_attn.k_proj"),
        (_W.wrong_grouping, "llama ort", "self_attn.q_proj"),
        (_W.duplicated_layer, "low-rank ort", "input_layernorm"),
        (_W.float16_overflow, "llama ort fp16", "mlp.up_proj"),
        (_W.corrupted_page, "low-rank ort fp16", "mlp.down_proj"),
        (_W.corrupted_exponent, "llama ort", "mlp.up_proj"),
        (_W.query_norm_lost, "qwen3 ort", "self_attn.q_norm"),
        (_W.swapped_experts, "qwen3_moe ort", "mlp"),
        (_G.wrong_rotary_base, "llama ort", "self_attn, before its o_proj"),
        (_G.wrong_rotary_interleaving, "llama onnx", "self_attn, before its o_proj"),
        (_G.rotary_off_by_one, "llama onnx", "self_attn, before its o_proj"),
        (_G.wrong_epsilon, "llama ort", "input_layernorm"),
        (_G.cache_off_by_one, "low-rank onnx", "self_attn, before its o_proj"),
        (_G.cache_swapped, "low-rank ort", "self_attn, before its o_proj"),
        (_G.cache_of_another_layer, "llama onnx", "self_attn, before its o_proj"),
        (_G.wrong_attention_scale, "qwen2 onnx", "attention"),
        (_G.softcap_dropped, "gemma2 ort", "self_attn, before its o_proj"),
        (_G.missing_residual, "llama ort", "before post_attention_layernorm"),
        (_G.dropped_layer, "llama onnx", "after mlp"),
        (_G.swapped_gate_and_up, "mixt onnx", "mlp, before its down_proj"),
        (_G.wrong_activation, "low-rank ort fp16", "mlp, before its down_proj"),
        (_G.wrong_gelu, "gpt2 onnx", "mlp"),
        (_G.norm_and_linear_out_of_order, "qwen2 ort", "post_attention_layernorm"),
    ),
    *_kinds(
        FIRST,
        (_G.causal_mask_off_by_one, "llama onnx", "self_attn, before its o_proj"),
        (_G.padding_ignored, "low-rank onnx", "self_attn, before its o_proj"),
        (_G.window_off_by_one, "gemma2 onnx", "self_attn, before its o_proj"),
    ),
    *_kinds(
        EMBEDDINGS,
        (_W.corrupted_embedding_page, "low-rank ort"),
        (_W.embedding_of_a_rare_token, "qwen2 ort"),
        (_W.rotary_table_end, "low-rank ort", "rotary table"),
        (_W.wrong_embedding_scale, "gemma2 ort"),
        (_G.positions_ignore_the_past, "gpt2 ort"),
    ),
    *_kinds(
        AFTER,
        (_W.head_not_tied, "llama ort", "lm_head"),
        (_G.last_position_off_by_one, "low-rank ort", "last position"),
    ),
    *_kinds(ANY, (_G.padding_counted, "low-rank ort")),
    *_kinds(
        FILES,
        (_F.stale_tokenizer, "llama ort"),
        (_F.stale_tokenizer_settings, "llama ort"),
        (_F.missing_tokenizer, "llama ort"),
        (_F.stale_config, "llama ort"),
        (_F.wrong_end_token, "llama ort"),
        (_F.wrong_end_token_in_manifest, "llama ort"),
        (_F.wrong_end_token_for_genai, "llama ort"),
        (_F.too_many_positions_promised, "llama onnx"),
        (_F.wrong_dtype_in_manifest, "llama ort"),
        (_F.wrong_cache_heads_in_manifest, "llama ort"),
        (_F.wrong_padding_in_manifest, "llama ort"),
        (_F.profile_too_short, "llama trt"),
        (_F.flipped_bit, "llama ort"),
        (_F.changed_graph, "llama ort"),
        (_F.changed_source_weights, "low-rank ort"),
        (_F.cut_weights, "llama ort"),
        (_F.cut_graph, "llama ort"),
        (_F.missing_weights, "llama ort"),
    ),
)
