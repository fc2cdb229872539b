"""Tiny random model folders in the Hugging Face layout, for tests: numpy, safetensors and tokenizers only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests import tiny_families

if TYPE_CHECKING:
    from mixt_export.checkpoints import Checkpoint

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

#: What each family's config.json adds to the common part.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "use_sliding_window": False,
        "head_dim": 16,
    },
}

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")

#: Every linear of a decoder layer, below ``model.layers.{i}.``, in the order of execution.
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def tiny_config(
    model_type: str = "llama", *, tied: bool = True, dtype: str = "float32", **overrides: Any
) -> dict[str, Any]:
    """config.json of a tiny model; ``overrides`` replace or add keys."""
    if model_type in tiny_families.CONFIGS:
        own = {"model_type": model_type, "tie_word_embeddings": tied and model_type != "gptj", "torch_dtype": dtype}
        return {**tiny_families.CONFIGS[model_type], **own, **overrides}
    return {
        "model_type": model_type,
        "hidden_size": 48,
        "intermediate_size": 104,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "torch_dtype": dtype,
        "use_cache": True,
        **FAMILIES[model_type],
        **overrides,
    }


def tiny_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model that ``config`` describes, as transformers names them."""
    if config["model_type"] in tiny_families.CONFIGS:
        return tiny_families.family_shapes(config)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    qwen2 = config["model_type"] == "qwen2"
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    sizes = {
        "q_proj": (heads * head_dim, hidden, qwen2 or attention_bias),
        "k_proj": (kv_heads * head_dim, hidden, qwen2 or attention_bias),
        "v_proj": (kv_heads * head_dim, hidden, qwen2 or attention_bias),
        "o_proj": (hidden, heads * head_dim, attention_bias),
        "gate_proj": (inner, hidden, mlp_bias),
        "up_proj": (inner, hidden, mlp_bias),
        "down_proj": (hidden, inner, mlp_bias),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config["model_type"] == "qwen3":
            shapes[prefix + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (head_dim,)
        for linear in LINEARS:
            out_features, in_features, bias = sizes[linear.rpartition(".")[2]]
            shapes[prefix + linear + ".weight"] = (out_features, in_features)
            if bias:
                shapes[prefix + linear + ".bias"] = (out_features,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def tiny_tensors(config: Mapping[str, Any], dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors: norms near 1, linears of spectral size ~1, a head that spreads the logits over several units."""
    from mixt_export.families import decoder_of

    rng = np.random.default_rng(seed)
    linears = decoder_of(config).linears
    transposed = {f"{linear.name}.weight" for linear in linears if linear.stored_transposed}
    tensors = {}
    for name, shape in tiny_shapes(config).items():
        noise = rng.standard_normal(shape)
        if len(shape) == 1 and name.endswith(".weight"):
            value = 0.2 * noise if config["model_type"].startswith("gemma") else 1.0 + 0.2 * noise
        elif name.endswith(".bias"):
            value = 0.3 * noise
        elif name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "lm_head.weight")):
            value = 0.4 * noise
        else:
            value = 1.3 * noise / np.sqrt(shape[0] if name in transposed else shape[1])
        tensors[name] = np.ascontiguousarray(value.astype(DTYPES[dtype]))
    return tensors


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: 256 bytes, three special tokens, no merges; round-trips any UTF-8 text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad = SPECIAL_TOKENS
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "model_max_length": 256,
            "chat_template": "{% for message in messages %}<|bos|>{{ message['role'] }}\n"
            "{{ message['content'] }}<|eos|>\n{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}",
        },
    )


def write_tiny(
    folder: Path,
    model_type: str = "llama",
    *,
    tied: bool = True,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write a tiny random dense folder and return it: hidden 48, 3 layers, 4 heads and 2 KV heads of 16, vocab 300.

    ``model_type``: llama, mistral, qwen2 (attention biases), qwen3 (q_norm and k_norm, explicit head_dim), or one of
    tests/tiny_families.py.
    ``dtype``: float32, float16 or bfloat16. ``shards`` > 1 writes model-0000x-of-0000n.safetensors and their index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(model_type, tied=tied, dtype=dtype, **config_overrides)
    tensors = tiny_tensors(config, dtype, seed)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    write_tokenizer(folder)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    names = list(tensors)
    for shard in range(shards):
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def write_tiny_low_rank(
    folder: Path,
    base: Path,
    ranks: Mapping[str, int] | int = 8,
    dtype: str | None = None,
    *,
    include: Callable[[str], bool] = lambda _name: True,
    seed: int = 1,
) -> Path:
    """Write ``base`` with linears replaced by random low-rank factors (mixt-factors format); return ``folder``.

    ``ranks``: one rank for every decoder linear, or ranks by the linear's last name (``q_proj``) or full name; linears
    that are not named stay dense. ``include`` filters full names. ``dtype`` of the cores: that of the base by default.
    """
    from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
    from mixt_export.network import build

    rng = np.random.default_rng(seed)
    source = open_checkpoint(base)
    factors, tensors = {}, []
    for linear, in_features, out_features, rank in _chosen(source, ranks, include):
        kind = dtype or source.store[f"{linear}.weight"].ref.dtype
        bias = source.store[f"{linear}.bias"].ref if f"{linear}.bias" in source.store else None
        factors[linear] = replace(build.low_rank(linear, in_features, out_features, rank, dtype=kind), bias=bias)
        core0 = (rng.standard_normal((in_features, rank)) / np.sqrt(in_features)).astype(DTYPES[kind])
        core1 = (1.3 * rng.standard_normal((rank, out_features)) / np.sqrt(rank)).astype(DTYPES[kind])
        for suffix, core in (("core0", core0), ("core1", core1)):
            tensors.append(NewTensor(f"{linear}.{suffix}", kind, core.shape, lambda core=core: core))
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, source, tensors, factors, {"method": "random low rank", "seed": seed})
    return Path(folder)


def _chosen(
    source: Checkpoint, sizes: Mapping[str, int] | int, include: Callable[[str], bool]
) -> Iterator[tuple[str, int, int, int]]:
    """Decoder linears of ``source`` that ``sizes`` gives a size above 0 and ``include`` lets through.

    Yields name, in features, out features, the size.
    """
    from mixt_export.families import decoder_of

    linears = {linear.name: linear for block in decoder_of(source.config).blocks for linear in block.linears}
    for name in source.store:
        linear = linears.get(name.removesuffix(".weight"))
        if linear is None or name == linear.name:
            continue
        last = linear.name.rpartition(".")[2]
        size = sizes if isinstance(sizes, int) else sizes.get(linear.name, sizes.get(last, 0))
        if size and include(linear.name):
            yield linear.name, linear.in_features, linear.out_features, size


def write_tiny_mixt(
    folder: Path,
    base: Path,
    terms: Mapping[str, int] | int = 3,
    dtype: str | None = None,
    *,
    bond: int = 2,
    paper_padding: bool = False,
    include: Callable[[str], bool] = lambda _name: True,
    seed: int = 1,
) -> Path:
    """Write ``base`` with linears replaced by random MixT cores (mixt-factors format); return ``folder``.

    ``terms``: N_T of every decoder linear, or N_T by the linear's last name (``q_proj``) or full name; linears that are
    not named stay dense. ``include`` filters full names. ``dtype`` of the cores: that of the base by default. Biases
    stay. The tiny sizes 48, 104 and 32 divide by 8: N_T up to 4 with bond 2 (bond 3 needs ``paper_padding``).
    """
    from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
    from mixt_export.network import build

    rng = np.random.default_rng(seed)
    source = open_checkpoint(base)
    factors, tensors = {}, []
    for linear, in_features, out_features, count in _chosen(source, terms, include):
        kind = dtype or source.store[f"{linear}.weight"].ref.dtype
        bias = source.store[f"{linear}.bias"].ref if f"{linear}.bias" in source.store else None
        mixture = build.mixt(
            linear, in_features, out_features, count, bond=bond, paper_padding=paper_padding, dtype=kind
        )
        factors[linear] = replace(mixture, bias=bias)
        for ref in mixture.tensors():
            # The scale 1/N and the sum of N independent branches leave a gain of about 1.3, as in tiny_tensors.
            core = (1.3 * rng.standard_normal(ref.shape) * np.sqrt(count / ref.shape[1])).astype(DTYPES[kind])
            tensors.append(NewTensor(ref.name, kind, core.shape, lambda core=core: core))
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, source, tensors, factors, {"method": "random mixt", "seed": seed})
    return Path(folder)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
