"""Hand-written tiny exported folders: one decoder per dialect, straight from onnx.helper, no exporter involved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny Llama-like decoder; odd on purpose."""

    vocab: int = 261
    hidden: int = 20
    inter: int = 27
    layers: int = 2
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    max_seq_len: int = 640
    eps: float = 1e-5
    theta: float = 1000.0


def random_weights(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights, linears as (in, out); large enough that logits differ clearly between tokens."""
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> np.ndarray:
        return (rng.standard_normal(size) * 1.3 / np.sqrt(size[0])).astype(np.float32)

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = {"embed": rng.standard_normal((shape.vocab, shape.hidden)).astype(np.float32)}
    for i in range(shape.layers):
        weights |= {
            f"{i}.norm1": (1 + 0.2 * rng.standard_normal(shape.hidden)).astype(np.float32),
            f"{i}.norm2": (1 + 0.2 * rng.standard_normal(shape.hidden)).astype(np.float32),
            f"{i}.q": normal(shape.hidden, q),
            f"{i}.k": normal(shape.hidden, kv),
            f"{i}.v": normal(shape.hidden, kv),
            f"{i}.o": normal(q, shape.hidden),
            f"{i}.gate": normal(shape.hidden, shape.inter),
            f"{i}.up": normal(shape.hidden, shape.inter),
            f"{i}.down": normal(shape.inter, shape.hidden),
        }
    weights["norm"] = (1 + 0.2 * rng.standard_normal(shape.hidden)).astype(np.float32)
    weights["head"] = normal(shape.hidden, shape.vocab) * 4
    return weights


class _Graph:
    """Collects nodes and constants under readable names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._count = 0

    def const(self, value: np.ndarray | list[int], name: str | None = None) -> str:
        array = np.asarray(value) if isinstance(value, np.ndarray) else np.asarray(value, np.int64)
        self._count += 1
        name = name or f"const_{self._count}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def op(
        self, kind: str, *inputs: str, outputs: int = 1, names: list[str] | None = None, **attributes: object
    ) -> str:
        self._count += 1
        outs = names or [f"{kind}_{self._count}_{j}" for j in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), outs, **attributes))
        return outs[0]


def build_ort(shape: Shape, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The `ort` dialect: GroupQueryAttention, past and present may be one buffer, right padding."""
    graph = _Graph()
    cos, sin = _angles(shape)
    tables = graph.const(cos, "cos"), graph.const(sin, "sin")
    counts = graph.op("ReduceSum", "attention_mask", graph.const([1]), keepdims=0)
    last_valid = graph.op("Sub", counts, graph.const([1]))
    seqlens = graph.op("Cast", last_valid, to=TensorProto.INT32)
    total = graph.op("Cast", graph.op("Shape", "attention_mask", start=1, end=2), to=TensorProto.INT32)
    total = graph.op("Squeeze", total)

    def attend(i: int, q: str, k: str, v: str) -> str:
        past = f"past_key_values.{i}.key", f"past_key_values.{i}.value"
        return graph.op(
            "GroupQueryAttention",
            *(q, k, v, *past, seqlens, total, *tables),
            names=[f"attention_{i}", f"present.{i}.key", f"present.{i}.value"],
            domain="com.microsoft",
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )

    hidden = _decoder(graph, shape, weights, attend)
    seq = graph.op("Shape", "input_ids", start=1, end=2)
    column = graph.op("Min", last_valid, graph.op("Sub", seq, graph.const([1])))
    column = graph.op("Reshape", column, graph.const([-1, 1]))
    last = graph.op("GatherND", hidden, column, batch_dims=1)
    return _finish(graph, shape, weights, graph.op("Unsqueeze", last, graph.const([1])))


def build_portable(shape: Shape, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The `portable` dialect: cache by Concat, left padding, positions from the attention mask."""
    graph = _Graph()
    cos, sin = _angles(shape)
    running = graph.op("CumSum", "attention_mask", graph.const(np.asarray(1, np.int64)))
    positions = graph.op("Max", graph.op("Sub", running, graph.const([1])), graph.const([0]))
    seq = graph.op("Shape", "input_ids", start=1, end=2)
    total = graph.op("Shape", "attention_mask", start=1, end=2)
    past_length = graph.op("Sub", total, seq)
    ends = graph.const([2**31])
    positions = graph.op("Slice", positions, past_length, ends, graph.const([1]))
    angles = [
        graph.op("Unsqueeze", graph.op("Gather", graph.const(table, name), positions), graph.const([1]))
        for table, name in ((cos, "cos"), (sin, "sin"))
    ]
    columns = graph.op(
        "Range", *(graph.const(np.asarray(0, np.int64)), graph.op("Squeeze", total)), graph.const(np.asarray(1))
    )
    rows = graph.op("Unsqueeze", graph.op("Slice", columns, past_length, ends, graph.const([0])), graph.const([1]))
    causal = graph.op("LessOrEqual", columns, rows)
    valid = graph.op("Cast", "attention_mask", to=TensorProto.BOOL)
    allowed = graph.op("And", causal, graph.op("Unsqueeze", valid, graph.const([1])))
    bias = graph.op("Where", allowed, graph.const(np.asarray(0, np.float32)), graph.const(np.asarray(-1e9, np.float32)))
    bias = graph.op("Unsqueeze", bias, graph.const([1, 2]))
    group = shape.heads // shape.kv_heads

    def heads(x: str, n: int) -> str:
        split = graph.op("Reshape", x, graph.const([0, 0, n, shape.head_dim]))
        return graph.op("Transpose", split, perm=[0, 2, 1, 3])

    def rotate(x: str) -> str:
        half = shape.head_dim // 2
        low = graph.op("Slice", x, graph.const([0]), graph.const([half]), graph.const([3]))
        high = graph.op("Slice", x, graph.const([half]), graph.const([2 * half]), graph.const([3]))
        new_low = graph.op("Sub", graph.op("Mul", low, angles[0]), graph.op("Mul", high, angles[1]))
        new_high = graph.op("Add", graph.op("Mul", high, angles[0]), graph.op("Mul", low, angles[1]))
        return graph.op("Concat", new_low, new_high, axis=3)

    def attend(i: int, q: str, k: str, v: str) -> str:
        keys = graph.op(
            "Concat",
            *(f"past_key_values.{i}.key", rotate(heads(k, shape.kv_heads))),
            names=[f"present.{i}.key"],
            axis=2,
        )
        values = graph.op(
            "Concat", f"past_key_values.{i}.value", heads(v, shape.kv_heads), names=[f"present.{i}.value"], axis=2
        )
        queries = graph.op(
            "Reshape", rotate(heads(q, shape.heads)), graph.const([0, shape.kv_heads, group, -1, shape.head_dim])
        )
        keys, values = (graph.op("Unsqueeze", x, graph.const([2])) for x in (keys, values))
        scores = graph.op("MatMul", queries, graph.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))
        scores = graph.op("Mul", scores, graph.const(np.asarray(shape.head_dim**-0.5, np.float32)))
        mixed = graph.op("MatMul", graph.op("Softmax", graph.op("Add", scores, bias), axis=-1), values)
        merged = graph.op("Reshape", mixed, graph.const([0, shape.heads, -1, shape.head_dim]))
        merged = graph.op("Transpose", merged, perm=[0, 2, 1, 3])
        return graph.op("Reshape", merged, graph.const([0, 0, -1]))

    hidden = _decoder(graph, shape, weights, attend)
    return _finish(graph, shape, weights, graph.op("Slice", hidden, graph.const([-1]), ends, graph.const([1])))


def write_folder(
    folder: Path, dialect: str, shape: Shape | None = None, *, seed: int = 0, **manifest_changes: object
) -> dict[str, np.ndarray]:
    """Write an exported folder of ``dialect`` with a byte-level tokenizer and a chat template; returns the weights."""
    shape = shape or Shape()
    weights = random_weights(shape, seed)
    folder.mkdir(parents=True, exist_ok=True)
    build = {"ort": build_ort, "portable": build_portable}[dialect]
    onnx.save(build(shape, weights), folder / "model.onnx")
    manifest = {
        "schema": 1,
        "target": "ort" if dialect == "ort" else "onnx",
        "dialect": dialect,
        "dtype": "float32",
        "padding": "right" if dialect == "ort" else "left",
        "kv": {
            "layers": shape.layers,
            "heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "dtype": "float32",
            "shared_buffer": dialect == "ort",
        },
        "limits": {"max_seq_len": shape.max_seq_len},
        "vocab_size": shape.vocab,
        "eos_token_ids": [257],
        "bos_token_id": None,
    }
    manifest.update(manifest_changes)
    (folder / "mixt_manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": {"content": "<|im_end|>"}}), encoding="utf-8"
    )
    return weights


def hf_config(shape: Shape) -> dict[str, object]:
    """The config.json that a tiny model of ``shape`` would have."""
    return {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "eos_token_id": 257,
    }


def byte_tokenizer() -> Tokenizer:
    """One token per byte (ids 0..255) and three specials: 256 <|im_start|>, 257 <|im_end|>, 258 <|pad|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    return tokenizer


def _angles(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    half = np.arange(shape.head_dim // 2)
    angle = np.outer(np.arange(shape.max_seq_len), shape.theta ** (-2.0 * half / shape.head_dim))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _decoder(graph: _Graph, shape: Shape, weights: dict[str, np.ndarray], attend: object) -> str:
    """Embedding and layers up to the last residual; returns hidden states (batch, seq, hidden)."""
    assert callable(attend)

    def linear(x: str, name: str) -> str:
        return graph.op("MatMul", x, graph.const(weights[name], name))

    hidden = graph.op("Gather", graph.const(weights["embed"], "embed"), "input_ids")
    for i in range(shape.layers):
        x = _norm(graph, shape, hidden, weights[f"{i}.norm1"])
        mixed = attend(i, *(linear(x, f"{i}.{name}") for name in "qkv"))
        hidden = graph.op("Add", hidden, linear(mixed, f"{i}.o"))
        x = _norm(graph, shape, hidden, weights[f"{i}.norm2"])
        gate = linear(x, f"{i}.gate")
        gate = graph.op("Mul", gate, graph.op("Sigmoid", gate))
        x = graph.op("Mul", gate, linear(x, f"{i}.up"))
        hidden = graph.op("Add", hidden, linear(x, f"{i}.down"))
    return hidden


def _norm(graph: _Graph, shape: Shape, x: str, weight: np.ndarray) -> str:
    mean = graph.op("ReduceMean", graph.op("Mul", x, x), graph.const([-1]))
    rms = graph.op("Sqrt", graph.op("Add", mean, graph.const(np.asarray(shape.eps, np.float32))))
    return graph.op("Mul", graph.op("Div", x, rms), graph.const(weight))


def _finish(graph: _Graph, shape: Shape, weights: dict[str, np.ndarray], last: str) -> onnx.ModelProto:
    """Final norm and head on (batch, 1, hidden), then inputs, outputs and opsets."""
    graph.op(
        "MatMul", _norm(graph, shape, last, weights["norm"]), graph.const(weights["head"], "head"), names=["logits"]
    )
    info = helper.make_tensor_value_info
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        info("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    outputs = [info("logits", TensorProto.FLOAT, ["batch", 1, shape.vocab])]
    for i in range(shape.layers):
        for part in ("key", "value"):
            size = [shape.kv_heads, shape.head_dim]
            inputs.append(info(f"past_key_values.{i}.{part}", TensorProto.FLOAT, ["batch", size[0], "past", size[1]]))
            outputs.append(info(f"present.{i}.{part}", TensorProto.FLOAT, ["batch", size[0], "present", size[1]]))
    built = helper.make_graph(graph.nodes, "tiny", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(built, opset_imports=opsets, ir_version=10)
