"""A decoder in ONNX written by hand for tests, with switches that break it; shares no code with the lowering.

It keeps the contract of the exported folder (inputs, outputs, names) in dialect portable: left-padded, cache grown by
concatenation.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file


class Builder:
    """Nodes, initializers and short calls; ``dtype`` is that of weights and activations."""

    def __init__(self, dtype: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.dtype = np.dtype(dtype)
        self.element = helper.np_dtype_to_tensor_dtype(self.dtype)
        self._count = 0

    def const(self, value: object, dtype: object = np.int64) -> str:
        self._count += 1
        name = f"const_{self._count}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, name: str, value: np.ndarray) -> str:
        if not any(tensor.name == name for tensor in self.initializers):
            value = np.ascontiguousarray(value.astype(self.dtype))
            self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str = "", out: str = "", **attributes: object) -> str:
        self._count += 1
        names = [out] if out else [f"value_{self._count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name or f"node_{self._count}", **attributes))
        return names[0]


def write_handmade(folder: Path, model: Path, *, dtype: str = "float32", faults: dict[str, int] | None = None) -> Path:
    """Write ``folder``/model.onnx for the Llama or Qwen2 folder ``model``. ``faults``: name -> layer that has it.

    Faults: swapped (up and gate), theta, bias (dropped), kv (off by one), scale, positions (ignore the past),
    duplicated (the layer's weights are those of its successor), padding (the mask is ignored), last (the last
    position is one too early), nan.
    """
    faults = faults or {}
    config = json.loads((model / "config.json").read_text())
    tensors = {name: value.astype(np.float32) for name, value in load_file(model / "model.safetensors").items()}
    b = Builder(dtype)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    dim = config.get("head_dim") or hidden // heads

    seq = b.op("Shape", "input_ids", start=1, end=2)
    total = b.op("Shape", "attention_mask", start=1, end=2)
    past = b.op("Sub", total, seq)
    counted = b.op("CumSum", "attention_mask", b.const([1]))
    all_positions = b.op("Max", b.op("Sub", counted, b.const([1])), b.const([0]))
    positions = b.op("Slice", all_positions, past, total, b.const([1]))
    broken_positions = b.op("Slice", all_positions, b.const([0]), seq, b.const([1]))
    keys = b.op("Range", b.const(0), b.op("Squeeze", total), b.const(1))
    rows = b.op("Unsqueeze", b.op("Range", b.op("Squeeze", past), b.op("Squeeze", total), b.const(1)), b.const([1]))
    causal = b.op("LessOrEqual", keys, rows)
    itself = b.op("Equal", keys, rows)
    valid = b.op("Cast", b.op("Unsqueeze", "attention_mask", b.const([1, 2])), to=TensorProto.BOOL)
    mask = b.op("And", b.op("Or", valid, itself), causal)
    no_padding = b.op("And", b.op("Or", valid, b.op("Not", valid)), causal)

    def norm(x: str, name: str) -> str:
        scale = b.weight(name, tensors[name])
        return b.op("RMSNormalization", x, scale, axis=-1, epsilon=config["rms_norm_eps"])

    def linear(x: str, name: str, drop_bias: bool = False) -> str:
        y = b.op("MatMul", x, b.weight(f"{name}.transposed", tensors[f"{name}.weight"].T))
        if f"{name}.bias" in tensors and not drop_bias:
            y = b.op("Add", y, b.weight(f"{name}.bias", tensors[f"{name}.bias"]))
        return y

    def rope(theta: float) -> tuple[str, str]:
        angles = np.outer(np.arange(config["max_position_embeddings"]), theta ** (-np.arange(0, dim, 2) / dim))
        return b.const(np.cos(angles), b.dtype), b.const(np.sin(angles), b.dtype)

    cos, sin = rope(config["rope_theta"])
    wrong_cos, wrong_sin = rope(config["rope_theta"] * 1.5)

    x = b.op("Gather", b.weight("model.embed_tokens.weight", tensors["model.embed_tokens.weight"]), "input_ids")
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, vocab])]
    for layer in range(config["num_hidden_layers"]):

        def broken(fault: str, layer: int = layer) -> bool:
            return faults.get(fault) == layer

        source = f"model.layers.{layer + 1 if broken('duplicated') else layer}"
        node, attn = f"/model/layers.{layer}", f"{source}.self_attn"
        normed = norm(x, f"{source}.input_layernorm.weight")
        q = linear(normed, f"{attn}.q_proj")
        k = linear(normed, f"{attn}.k_proj", broken("bias"))
        v = linear(normed, f"{attn}.v_proj", broken("bias"))
        where = broken_positions if broken("positions") else positions
        tables = (wrong_cos, wrong_sin) if broken("theta") else (cos, sin)
        q = b.op("RotaryEmbedding", q, *tables, where, num_heads=heads)
        k = b.op("RotaryEmbedding", k, *tables, where, num_heads=kv_heads)
        split = b.const([0, 0, kv_heads, dim])
        past_k, past_v = f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"
        cache = []
        for new, old, present in ((k, past_k, f"present.{layer}.key"), (v, past_v, f"present.{layer}.value")):
            apart = b.op("Transpose", b.op("Reshape", new, split), perm=[0, 2, 1, 3])
            if broken("kv") and new is v:  # the cached values slide by one position, the new ones are right
                first = b.op("Slice", old, b.const([1]), b.const([2**31]), b.const([2]))
                last = b.op("Slice", old, b.const([0]), b.const([1]), b.const([2]))
                old = b.op("Concat", first, last, axis=2)
            cache.append(b.op("Concat", old, apart, axis=2, out=present))
            for name, kind in ((past_k if new is k else past_v, "past"), (present, "total")):
                info = helper.make_tensor_value_info(name, b.element, ["batch", kv_heads, kind, dim])
                (inputs if kind == "past" else outputs).append(info)
        wide = b.op("Transpose", b.op("Reshape", q, b.const([0, 0, heads, dim])), perm=[0, 2, 1, 3])
        scale = dim**-0.5 * (1.25 if broken("scale") else 1.0)
        attended = b.op(
            "Attention", wide, *cache, no_padding if broken("padding") else mask, scale=scale, name=f"{node}/attention"
        )
        joined = b.op("Reshape", b.op("Transpose", attended, perm=[0, 2, 1, 3]), b.const([0, 0, heads * dim]))
        middle = b.op("Add", x, linear(joined, f"{attn}.o_proj"))
        normed = norm(middle, f"{source}.post_attention_layernorm.weight")
        gate, up = (linear(normed, f"{source}.mlp.{name}_proj") for name in ("gate", "up"))
        if broken("swapped"):
            gate, up = up, gate
        inner = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
        y = b.op("Add", middle, linear(inner, f"{source}.mlp.down_proj"), out="" if broken("nan") else f"{node}/output")
        if broken("nan"):
            y = b.op("Div", y, b.op("Sub", y, y), out=f"{node}/output")
        x = y
    normed = norm(x, "model.norm.weight")
    end = b.op("Sub", seq, b.const([1]))
    if "last" in faults:
        end = b.op("Max", b.op("Sub", end, b.const([1])), b.const([0]))
    picked = b.op("Gather", normed, end, axis=1, name="/lm_head/last_position")
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    logits = b.op("MatMul", picked, b.weight("lm_head.transposed", head.T))
    b.op("Cast", logits, to=TensorProto.FLOAT, out="logits")

    graph = helper.make_graph(b.nodes, "handmade", inputs, outputs, b.initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        proto, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=256
    )
    return folder
