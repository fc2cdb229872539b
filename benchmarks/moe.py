"""One mixture-of-experts layer on ONNX Runtime's CPU: ways of running the chosen experts, dense and factorised.

Random weights: no public mixture of experts is small enough to be fetched here, so this says nothing about quality.
Shapes are Qwen3-30B-A3B's (128 experts, 8 per token, 2048 → 768) scaled down. `apart` and `looped` are the exporter's
own graphs (docs/moe.md); the others are written here for comparison. One thread, variants interleaved in one process.

    python -m benchmarks.moe
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper

from benchmarks.common import interleaved, paired_ratio, publish, timer
from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.compression.td_moe.sizing import Stack, choose
from mixt_export.families import decoder_of
from mixt_export.families.wiring import MoeMlp
from mixt_export.lower.builder import GraphBuilder
from mixt_export.lower.context import Context
from mixt_export.lower.dialects import DIALECTS
from mixt_export.lower.linear import LinearContext
from mixt_export.lower.mlp.experts import lower_moe
from mixt_export.lower.precision import Islands, Precision
from mixt_export.lower.weights import Weights, write_streamed
from mixt_export.network import FactorizedLinear, build
from mixt_export.staging import link_or_copy

#: experts, chosen per token, hidden, inner
SHAPES = ((64, 8, 1024, 384), (128, 8, 512, 192))
ROWS = (1, 4, 16, 128, 512)
KEEP = 0.8


def write_dense(folder: Path, experts: int, top_k: int, hidden: int, inner: int) -> Path:
    """A folder that holds the one layer's experts and router, float32, normal with variance 1 / inputs."""
    from safetensors.numpy import save_file

    rng, stem = np.random.default_rng(0), "model.layers.0.mlp"
    tensors = {f"{stem}.gate.weight": rng.standard_normal((experts, hidden), np.float32) * 3 / hidden**0.5}
    for expert in range(experts):
        for kind, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            name = f"{stem}.experts.{expert}.{kind}_proj.weight"
            tensors[name] = rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "qwen3_moe", "hidden_size": hidden, "intermediate_size": inner, "moe_intermediate_size": inner,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 64, "num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_factors(folder: Path, base: Path, kind: str, ranks: tuple[int, int]) -> Path:
    """``base`` with random factors: "td-moe" for gates and ups, or "low rank" for every linear at half its size."""
    source, rng = open_checkpoint(base), np.random.default_rng(1)
    factors: dict[str, FactorizedLinear] = {}
    tensors: dict[str, NewTensor] = {}
    for stored, ref in source.store.refs.items():
        name = stored.removesuffix(".weight")
        outside, inside = ref.shape
        last = name.rpartition(".")[2]
        if ".experts." not in name or (kind == "td-moe" and last == "down_proj"):
            continue
        if kind == "td-moe":
            shared = f"{name.split('.experts.')[0]}.experts.{last}"
            names = (f"{shared}.u_in", f"{name}.core", f"{shared}.u_out")
            factors[name] = build.tucker2(name, inside, outside, *ranks, names=names)
        else:
            factors[name] = build.low_rank(name, inside, outside, inside * outside // (2 * (inside + outside)))
        for core in factors[name].tensors():
            values = rng.standard_normal(core.shape, np.float32) / core.shape[0] ** 0.5
            tensors.setdefault(core.name, NewTensor(core.name, "float32", core.shape, partial(np.asarray, values)))
    folder.mkdir()
    write_checkpoint(folder, source, list(tensors.values()), factors, {})
    return folder


def exported(folder: Path, dialect: str, hidden: int) -> ort.InferenceSession:
    """The layer as the exporter lowers it for ``dialect``."""
    checkpoint = open_checkpoint(folder)
    (mlp,) = (block.mlp for block in decoder_of(checkpoint.config).blocks)
    assert isinstance(mlp, MoeMlp)
    chosen, weights = DIALECTS[dialect], Weights(checkpoint, "float32")
    builder = GraphBuilder("layer", chosen.opset, chosen.ir_version)
    linears = LinearContext(builder, weights, fused_transpose=dialect == "ort", forms={}, flat=chosen.typed)
    context = Context(builder, weights, chosen, Precision(builder, ir.DataType.FLOAT), Islands(), linears)
    x = builder.input("x", ir.DataType.FLOAT, ["batch", "seq", hidden])
    builder.output(lower_moe(context, mlp, x, "/mlp"), "y")
    out = folder / f"out-{dialect}"
    out.mkdir()
    for path in weights.linked:
        link_or_copy(path, out / path.name)
    write_streamed(weights, out)
    ir.save(builder.model({}, ""), out / "model.onnx")
    return ort.InferenceSession(out / "model.onnx", _options())


def written(folder: Path, how: str, top_k: int) -> ort.InferenceSession:
    """Other ways: "gathered" copies the chosen matrices of every token, "every" runs all experts, "operator" is MoE."""
    store = open_checkpoint(folder).store
    stem = "model.layers.0.mlp"
    experts = len([name for name in store if name.endswith("down_proj.weight")])

    def pile(kind: str) -> np.ndarray[Any, Any]:
        return np.stack([store.read(f"{stem}.experts.{e}.{kind}_proj.weight") for e in range(experts)])

    gate, up, down = pile("gate"), pile("up"), pile("down")
    hidden = down.shape[1]
    weights = {"router": np.ascontiguousarray(store.read(f"{stem}.gate.weight").T)}
    if how == "operator":  # gate and up interleaved, the one layout its CPU kernel takes
        weights |= {"gate_up": np.stack([gate, up], 2).reshape(experts, -1, hidden), "down": down}
        text = f"""
          flat = Reshape(x, tokens_hidden)
          logits = MatMul(flat, router)
          out = com.microsoft.MoE <k = {top_k}, activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = 1.0,
            activation_beta = 0.0, normalize_routing_weights = 1> (flat, logits, gate_up, , down)
          shape = Shape(x)
          y = Reshape(out, shape)"""
    else:
        piles = {"gate": gate, "up": up, "down": down}
        weights |= {name: np.ascontiguousarray(stack.transpose(0, 2, 1)) for name, stack in piles.items()}
        routing = """
          flat = Reshape(x, tokens_hidden)
          logits = MatMul(flat, router)
          scores = Softmax <axis = -1> (logits)
          best, index = TopK <axis = -1, largest = 1, sorted = 1> (scores, k)
          total = ReduceSum <keepdims = 1> (best, last)
          weight = Div(best, total)"""
        experts_of = {
            "gathered": """
          rows = Unsqueeze(flat, one_two)
          g = Gather <axis = 0> (gate, index)
          u = Gather <axis = 0> (up, index)
          d = Gather <axis = 0> (down, index)
          a = MatMul(rows, g)
          b = MatMul(rows, u)
          s = Sigmoid(a)
          t = Mul(a, s)
          h = Mul(t, b)
          z = MatMul(h, d)
          w = Unsqueeze(weight, two_three)
          wz = Mul(z, w)
          out = ReduceSum <keepdims = 0> (wz, one)""",
            "every": """
          a = MatMul(flat, gate)
          b = MatMul(flat, up)
          s = Sigmoid(a)
          t = Mul(a, s)
          h = Mul(t, b)
          z = MatMul(h, down)
          column = Unsqueeze(index, last)
          equal = Equal(column, numbers)
          ones = Cast <to = 1> (equal)
          apart = Unsqueeze(weight, last)
          spread = Mul(ones, apart)
          full = ReduceSum <keepdims = 0> (spread, one)
          by_expert = Transpose <perm = [1, 0]> (full)
          w = Unsqueeze(by_expert, last)
          wz = Mul(z, w)
          out = ReduceSum <keepdims = 0> (wz, zero)""",
        }[how]
        text = f"{routing}{experts_of}\n          shape = Shape(x)\n          y = Reshape(out, shape)"
    small = {
        "tokens_hidden": [-1, hidden], "k": [top_k], "last": [-1], "zero": [0], "one": [1], "one_two": [1, 2],
        "two_three": [2, 3], "numbers": list(range(experts)),
    }  # fmt: skip
    weights |= {name: np.array(values, np.int64) for name, values in small.items()}
    lines = [line.strip() for line in text.strip().splitlines()]
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
        f"layer (float[batch, seq, {hidden}] x) => (float[batch, seq, {hidden}] y) {{\n" + "\n".join(lines) + "\n}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return ort.InferenceSession(model.SerializeToString(), _options())


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def macs(shape: tuple[int, int, int, int], ranks: tuple[int, int]) -> dict[str, int]:
    """Multiply-adds of one token, router left out."""
    _, k, hidden, inner = shape
    r_in, r_out = ranks
    factorised = 2 * (hidden * r_in + k * (r_in * r_out + r_out * inner)) + k * inner * hidden
    return {"dense": 3 * k * hidden * inner, f"td-moe, keep {KEEP}": factorised}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    result: dict[str, Any] = {}
    for shape in SHAPES:
        experts, top_k, hidden, inner = shape
        ranks = choose(Stack("", experts, inner, hidden), KEEP, np.ones(hidden), np.ones(inner))
        with tempfile.TemporaryDirectory() as temporary:
            base = write_dense(Path(temporary) / "dense", *shape)
            tucker = write_factors(Path(temporary) / "td-moe", base, "td-moe", ranks)
            low_rank = write_factors(Path(temporary) / "low-rank", base, "low rank", ranks)
            models = {
                "apart": exported(base, "ort", hidden),
                "looped": exported(base, "trt11", hidden),
                "operator": written(base, "operator", top_k),
                "gathered": written(base, "gathered", top_k),
                "every": written(base, "every", top_k),
                f"apart, td-moe, keep {KEEP}": exported(tucker, "ort", hidden),
                "apart, low rank, keep 0.5": exported(low_rank, "ort", hidden),
            }
            found: dict[str, Any] = {
                f"rows {rows}": _times(models, rows, hidden, rounds if rows < 100 else max(3, rounds // 3))
                for rows in ROWS
            }
        found["td-moe ranks (in, out)"] = list(ranks)
        found["multiply-adds per token"] = macs(shape, ranks)
        result[f"{experts} experts, {top_k} per token, {hidden} → {inner}"] = found
    publish("moe", {"threads": 1, "weights": "random", "layers": result})


def _times(models: dict[str, ort.InferenceSession], rows: int, hidden: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each variant that is sane at so many rows, and the multiple of `apart` that is."""
    x = np.random.default_rng(rows).standard_normal((1, rows, hidden), np.float32)
    limits = {"gathered": 16, "every": 128}
    chosen = {name: model for name, model in models.items() if rows <= limits.get(name, rows)}
    expected = chosen["apart"].run(None, {"x": x})[0]
    for name, model in chosen.items():
        if "keep" not in name:
            error = np.linalg.norm(model.run(None, {"x": x})[0] - expected) / np.linalg.norm(expected)
            assert error < 1e-5, f"{name} differs by {error}"
    seconds = interleaved({name: partial(timer, model, x, 1) for name, model in chosen.items()}, rounds)
    return {
        name: {
            "milliseconds": round(1e3 * statistics.median(values), 2),
            "times apart": paired_ratio(values, seconds["apart"])["median"],
        }
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    main()
