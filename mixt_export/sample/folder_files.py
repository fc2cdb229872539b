"""The JSON files of the sample's Hugging Face folder, from the metadata of its GGUF file."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixt_export.sample.gguf_llama import GgufLlama

_CONTROL = 3  # gguf.TokenType.CONTROL


def json_files(model: GgufLlama) -> dict[str, dict[str, Any]]:
    """File name -> JSON content: config, generation_config, tokenizer, tokenizer_config, special_tokens_map."""
    tokens: list[str] = model.value("tokenizer.ggml.tokens")
    ids = {
        "bos": int(model.value("tokenizer.ggml.bos_token_id")),
        "eos": int(model.value("tokenizer.ggml.eos_token_id")),
        "pad": int(model.value("tokenizer.ggml.padding_token_id")),
    }
    named = {f"{kind}_token": tokens[token] for kind, token in ids.items()}
    named["unk_token"] = tokens[int(model.value("tokenizer.ggml.unknown_token_id"))]
    return {
        "config.json": _config(model, ids),
        "generation_config.json": {f"{kind}_token_id": token for kind, token in ids.items()},
        "tokenizer.json": _tokenizer(model, tokens),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": int(model.value("llama.context_length")),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **named,
            "additional_special_tokens": [named["bos_token"], named["eos_token"]],
            "chat_template": model.value("tokenizer.chat_template"),
        },
        "special_tokens_map.json": {
            **named,
            "additional_special_tokens": [named["bos_token"], named["eos_token"]],
        },
    }


def _config(model: GgufLlama, ids: dict[str, int]) -> dict[str, Any]:
    hidden = int(model.value("llama.embedding_length"))
    heads = int(model.value("llama.attention.head_count"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(model.value("llama.feed_forward_length")),
        "num_hidden_layers": int(model.value("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(model.value("llama.attention.head_count_kv")),
        "head_dim": hidden // heads,
        "vocab_size": int(model.value("llama.vocab_size")),
        "max_position_embeddings": int(model.value("llama.context_length")),
        "rope_theta": float(model.value("llama.rope.freq_base")),
        # the file stores float32; its shortest decimal is the value that was meant
        "rms_norm_eps": float(str(np.float32(model.value("llama.attention.layer_norm_rms_epsilon")))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        **{f"{kind}_token_id": token for kind, token in ids.items()},
    }


def _tokenizer(model: GgufLlama, tokens: list[str]) -> dict[str, Any]:
    """tokenizer.json of llama.cpp's pre-tokenizer type "smollm": single digits, then GPT-2's byte-level BPE."""
    kinds: list[int] = model.value("tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": tokens[token],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, kind in enumerate(kinds)
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in model.value("tokenizer.ggml.merges")],
        },
    }
