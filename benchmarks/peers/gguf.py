"""A Llama folder as a GGUF file for llama.cpp; the other types are made from it by llama.cpp's own quantiser.

Names and the row order of q and k are those of llama.cpp's convert_hf_to_gguf.py: it rotates neighbouring rows
(2i, 2i + 1) where transformers rotates (i, i + head_dim / 2), so the halves of a head are interleaved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.checkpoints import open_checkpoint
from mixt_export.sample.gguf_llama import LAYER_PARTS

_PERMUTED = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
#: Token types of the format: 1 normal, 3 control.
_NORMAL, _CONTROL = 1, 3


def write_gguf(folder: Path, target: Path, dtype: type[np.floating[Any]]) -> None:
    """Write the Llama model of ``folder`` with matrices of ``dtype`` (float32 or float16) and float32 norms."""
    import gguf

    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype is np.float16 else gguf.LlamaFileType.ALL_F32)
    _numbers(writer, config)
    _vocabulary(writer, folder, config)
    for name, origin, heads in _sources(config):
        values = checkpoint.store.read(f"{name}.weight", "float32")
        if heads:
            values = permute_rows(values, heads)
        writer.add_tensor(f"{origin}.weight", values.astype(dtype if values.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permute_rows(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """``weight`` (heads * head_dim, in) with the two halves of each head's rows interleaved."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _sources(config: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(module path, GGUF name, heads where rows are permuted else 0) of every tensor; the head is tied."""
    found = [("model.embed_tokens", "token_embd", 0)]
    for layer in range(config["num_hidden_layers"]):
        found += [
            (
                f"model.layers.{layer}.{part}",
                f"blk.{layer}.{origin}",
                int(config[_PERMUTED[part]]) if part in _PERMUTED else 0,
            )
            for part, origin in LAYER_PARTS.items()
        ]
    return [*found, ("model.norm", "output_norm", 0)]


def _numbers(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_vocab_size(config["vocab_size"])


def _rope_theta(config: dict[str, Any]) -> float:
    """Base of the rotary frequencies: in `rope_parameters` (transformers 5) or beside the other sizes."""
    return float((config.get("rope_parameters") or config)["rope_theta"])


def _vocabulary(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    special = {token["id"] for token in tokenizer.get("added_tokens", ()) if token.get("special")}
    names = {index: token for token, index in model["vocab"].items()}
    names.update({token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())})
    order = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([names[index] for index in order])
    writer.add_token_types([_CONTROL if index in special else _NORMAL for index in order])
    merges = model["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
