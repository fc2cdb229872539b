"""config.json and tensors of tiny models of families that are not wired like Llama (see tests/tiny.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]

_COMMON = {
    "vocab_size": 300,
    "initializer_range": 0.02,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "use_cache": True,
}
_GPT = {**_COMMON, "n_layer": 3, "n_inner": 104, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
_LLAMA_LIKE = {
    **_COMMON,
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
_HEADS_OF_16 = {"num_attention_heads": 3, "num_key_value_heads": 1}
_GEMMA = {**_LLAMA_LIKE, "head_dim": 16, "rope_theta": 10000.0, "attention_bias": False}

#: Keys of each family; heads are of 16 features but for GPT-J, where 16 of 32 rotate.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT, "architectures": ["GPT2LMHeadModel"], "n_embd": 48, "n_head": 3, "n_positions": 256},
    "qwen3_moe": {
        **_LLAMA_LIKE,
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_act": "silu",
        "head_dim": 16,
        "attention_bias": False,
        "use_sliding_window": False,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "gptj": {
        **_GPT, "architectures": ["GPTJForCausalLM"], "n_embd": 64, "n_head": 2, "n_positions": 256, "rotary_dim": 16,
    },
    "granite": {
        **_LLAMA_LIKE,
        "architectures": ["GraniteForCausalLM"],
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        **_HEADS_OF_16,
    },
    "olmo2": {
        **_LLAMA_LIKE, "architectures": ["Olmo2ForCausalLM"], "rope_theta": 10000.0, "attention_bias": False,
        **_HEADS_OF_16,
    },
    "phi3": {
        **_LLAMA_LIKE,
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 256,
        "sliding_window": 5,
    },
    "smollm3": {
        **_LLAMA_LIKE,
        "architectures": ["SmolLM3ForCausalLM"],
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": [1, 0, 1],
        **_HEADS_OF_16,
    },
    "starcoder2": {
        **{key: value for key, value in _LLAMA_LIKE.items() if key != "rms_norm_eps"},
        "architectures": ["Starcoder2ForCausalLM"],
        "rope_theta": 10000.0,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "use_bias": True,
        **_HEADS_OF_16,
    },
    "gemma": {**_GEMMA, "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {
        **_GEMMA,
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "sliding_window": 5,
    },
    "gemma3_text": {
        **{key: value for key, value in _GEMMA.items() if key != "rope_theta"},
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
}  # fmt: skip


def family_shapes(config: Mapping[str, Any]) -> Shapes:
    """Name and shape of every tensor of a model of one of CONFIGS, as transformers names them."""
    return _SHAPES[config["model_type"]](config)


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn, vocab = config["n_embd"], config["n_inner"] or 4 * config["n_embd"], config["vocab_size"]
    shapes: Shapes = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        shapes |= _layer_norm(prefix + "ln_1", hidden)
        for name, inputs, outputs in (
            ("attn.c_attn", hidden, 3 * hidden), ("attn.c_proj", hidden, hidden), ("ln_2", 0, hidden),
            ("mlp.c_fc", hidden, ffn), ("mlp.c_proj", ffn, hidden),
        ):  # fmt: skip
            shapes[f"{prefix}{name}.weight"] = (inputs, outputs) if inputs else (outputs,)
            shapes[f"{prefix}{name}.bias"] = (outputs,)
    shapes |= _layer_norm("transformer.ln_f", hidden)
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (vocab, hidden)}


def _gptj(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn, vocab = config["n_embd"], config["n_inner"] or 4 * config["n_embd"], config["vocab_size"]
    shapes: Shapes = {"transformer.wte.weight": (vocab, hidden)}
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        shapes |= _layer_norm(prefix + "ln_1", hidden)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{prefix}attn.{part}.weight"] = (hidden, hidden)
        for part, inputs, outputs in (("fc_in", hidden, ffn), ("fc_out", ffn, hidden)):
            shapes[f"{prefix}mlp.{part}.weight"], shapes[f"{prefix}mlp.{part}.bias"] = (outputs, inputs), (outputs,)
    shapes |= _layer_norm("transformer.ln_f", hidden)
    if not config["tie_word_embeddings"]:
        shapes |= {"lm_head.weight": (vocab, hidden), "lm_head.bias": (vocab,)}
    return shapes


def _qwen3_moe(config: Mapping[str, Any]) -> Shapes:
    hidden, dim, vocab = config["hidden_size"], config["head_dim"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (rows * dim, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, heads * dim)
        shapes[f"{prefix}.self_attn.q_norm.weight"] = (dim,)
        shapes[f"{prefix}.self_attn.k_norm.weight"] = (dim,)
        mlps = [(f"{prefix}.mlp", config["intermediate_size"])]
        if layer not in config["mlp_only_layers"] and (layer + 1) % config["decoder_sparse_step"] == 0:
            count = config["num_experts"]
            shapes[f"{prefix}.mlp.gate.weight"] = (count, hidden)
            mlps = [(f"{prefix}.mlp.experts.{index}", config["moe_intermediate_size"]) for index in range(count)]
        for name, inner in mlps:
            shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (inner, hidden)
            shapes[f"{name}.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _gemma(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn, vocab, dim = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] != "gemma":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    heads = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in norms}
        if config["model_type"] == "gemma3_text":
            shapes |= {f"{prefix}self_attn.{norm}.weight": (dim,) for norm in ("q_norm", "k_norm")}
        shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in heads.items()}
        if config["attention_bias"]:
            shapes |= {f"{prefix}self_attn.{name}.bias": shape[:1] for name, shape in heads.items()}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (vocab, hidden)}


def _llama_like(config: Mapping[str, Any]) -> Shapes:
    """Granite, OLMo 2, Phi-3, SmolLM3 and StarCoder2: Llama's names, each with its own norms and projections."""
    kind, hidden, ffn = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = hidden // heads
    linears = {
        "self_attn.q_proj": (heads * dim, hidden), "self_attn.k_proj": (kv_heads * dim, hidden),
        "self_attn.v_proj": (kv_heads * dim, hidden), "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    if kind == "phi3":
        linears = {name: linears[name] for name in ("self_attn.o_proj", "mlp.down_proj")}
        linears["self_attn.qkv_proj"] = ((heads + 2 * kv_heads) * dim, hidden)
        linears["mlp.gate_up_proj"] = (2 * ffn, hidden)
    if kind == "starcoder2":
        linears = {name: shape for name, shape in linears.items() if name.startswith("self_attn")}
        linears |= {"mlp.c_fc": (ffn, hidden), "mlp.c_proj": (hidden, ffn)}
    norms = {"post_attention_layernorm": hidden}
    if kind == "olmo2":
        norms |= {"post_feedforward_layernorm": hidden}
        norms |= {"self_attn.q_norm": heads * dim, "self_attn.k_norm": kv_heads * dim}
    else:
        norms["input_layernorm"] = hidden
    bias = bool(config.get("use_bias"))
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in ({norm: (size,) for norm, size in norms.items()} | linears).items():
            shapes[f"{prefix}{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes |= _layer_norm("model.norm", hidden) if bias else {"model.norm.weight": (hidden,)}
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (config["vocab_size"], hidden)}


def _layer_norm(name: str, features: int) -> Shapes:
    return {f"{name}.weight": (features,), f"{name}.bias": (features,)}


_SHAPES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "gpt2": _gpt2,
    "gptj": _gptj,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    **dict.fromkeys(("granite", "olmo2", "phi3", "smollm3", "starcoder2"), _llama_like),
}
