"""Lower a whole decoder: embedding, blocks, final norm, head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mixt_export import __version__
from mixt_export.checkpoints import Checkpoint
from mixt_export.families.wiring import Block, Decoder, Linear
from mixt_export.lower.attention import ATTENTIONS, Attention, Cache, Heads, Inputs
from mixt_export.lower.builder import MICROSOFT_DOMAIN, Dim, GraphBuilder
from mixt_export.lower.dialects import Dialect, check_dialect
from mixt_export.lower.linear import LinearContext, is_dense, lower_dense, lower_linear, packs_in_place
from mixt_export.lower.norms import NORMS
from mixt_export.lower.precision import HEAD, Islands, Precision
from mixt_export.lower.weights import DTYPES, Weights
from mixt_export.network import FactorizedLinear
from mixt_export.plan import FormPlan, choose_forms


@dataclass(frozen=True)
class LoweredModel:
    """A graph, the weights it points at, and the form each linear took."""

    model: ir.Model
    weights: Weights
    forms: dict[str, str]


def lower_decoder(
    decoder: Decoder,
    checkpoint: Checkpoint,
    dialect: Dialect,
    *,
    dtype: str,
    max_seq_len: int,
    islands: Islands = Islands(),  # noqa: B008 (frozen)
    plan: FormPlan | None = None,
) -> LoweredModel:
    """Build the graph of ``decoder`` with the weights of ``checkpoint``; no weight is read.

    dtype: "float32", "float16" or "bfloat16", of weights and activations; norm statistics are computed and logits
    returned in float32. max_seq_len: positions in the rotary tables. islands: what a typed dialect computes in float32
    besides. plan: executable forms of the MixT linears, by default those of `choose_forms`.
    Raises CheckpointError when a tensor is missing or has another shape than config.json implies.
    """
    if plan is None:
        plan = choose_forms(factors_of(decoder, checkpoint))
    lowering = _Lowering(decoder, Weights(checkpoint, dtype), dialect, max_seq_len, islands, plan)
    return lowering.run()


def factors_of(decoder: Decoder, checkpoint: Checkpoint) -> list[FactorizedLinear]:
    """The factorised linears of ``decoder``, in the order of execution."""
    found = [checkpoint.factors.get(linear.name) for linear in decoder.linears]
    return [factors for factors in found if factors is not None]


class _Lowering:
    def __init__(
        self, decoder: Decoder, weights: Weights, dialect: Dialect, max_seq_len: int, islands: Islands, plan: FormPlan
    ) -> None:
        self.decoder, self.weights, self.dialect, self.islands = decoder, weights, dialect, islands
        self.dtype = DTYPES[weights.dtype]
        self.builder = builder = GraphBuilder("model", dialect.opset, dialect.ir_version)
        self.precision = Precision(builder, self.dtype)
        fused = MICROSOFT_DOMAIN in dialect.operators and weights.dtype == "float32"
        self.linears = LinearContext(builder, weights, fused_transpose=fused, forms={}, choices=plan.choices)
        int64 = ir.DataType.INT64
        self.input_ids = builder.input("input_ids", int64, ["batch", "seq"])
        mask = builder.input("attention_mask", int64, ["batch", "total"])
        cache: list[Dim] = ["batch", decoder.kv_heads, "past", decoder.head_dim]
        self.past = [
            Cache(*(builder.input(f"past_key_values.{i}.{part}", self.dtype, cache) for part in ("key", "value")))
            for i in range(len(decoder.blocks))
        ]
        self.attention: Attention = ATTENTIONS[dialect.name](
            Inputs(builder, weights, decoder, self.input_ids, mask, max_seq_len, self.precision, islands)
        )

    def run(self) -> LoweredModel:
        x = self._embed()
        present = []
        for block, past in zip(self.decoder.blocks, self.past, strict=True):
            x, new = self._block(block, x, past)
            present.append(new)
        normed = self._norm(x, self.decoder.final_norm, "/model/norm")
        self.builder.output(self._head(self.attention.last_position(normed, "/lm_head/last_position")), "logits")
        for index, cache in enumerate(present):
            self.builder.output(cache.key, f"present.{index}.key")
            self.builder.output(cache.value, f"present.{index}.value")
        model = self.builder.model({"mixt.dialect": self.dialect.name, "mixt.version": __version__}, __version__)
        check_dialect(model, self.dialect)
        return LoweredModel(model, self.weights, self.linears.forms)

    def _shape(self, features: int) -> list[Dim]:
        return ["batch", "seq", features]

    def _embed(self) -> ir.Value:
        d = self.decoder
        self.weights.expect(d.embedding, (d.vocab_size, d.hidden_size))
        table = self.builder.initializer(self.weights.tensor(d.embedding))
        x = self.builder.op(
            "Gather", [table, self.input_ids], name="/model/embed_tokens/Gather", dtype=self.dtype,
            shape=self._shape(d.hidden_size),
        )  # fmt: skip
        return self._stream(x)

    def _block(self, block: Block, x: ir.Value, past: Cache) -> tuple[ir.Value, Cache]:
        node, width = f"/model/layers.{block.index}", self.decoder.hidden_size
        normed = self._norm(x, block.input_norm, f"{node}/input_layernorm")
        attended, cache = self._attention(block, normed, past, f"{node}/self_attn")
        middle = self._binary("Add", x, self._stream(attended), f"{node}/self_attn/residual", width)
        normed = self._norm(middle, block.post_attention_norm, f"{node}/post_attention_layernorm")
        mlp = self._mlp(block, normed, f"{node}/mlp")
        y = self._binary("Add", middle, self._stream(mlp), f"{node}/mlp/residual", width)
        y.name = f"{node}/output"
        return y, cache

    def _attention(self, block: Block, x: ir.Value, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        qkv = (block.q, block.k, block.v)
        if self.attention.packs_qkv and block.q_norm is None and packs_in_place(self.linears, qkv):
            heads = Heads(lower_dense(self.linears, qkv, x, f"{node}/qkv_proj"), None, None)
        else:
            q, k, v = (self._linear(linear, x, f"{node}/{_stem(linear.name)}") for linear in qkv)
            q = self._head_norm(q, block.q_norm, self.decoder.heads, f"{node}/q_norm")
            k = self._head_norm(k, block.k_norm, self.decoder.kv_heads, f"{node}/k_norm")
            heads = Heads(q, k, v)
        out, cache = self.attention.attend(block, heads, past, node)
        return self._linear(block.o, out, f"{node}/o_proj"), cache

    def _mlp(self, block: Block, x: ir.Value, node: str) -> ir.Value:
        ffn = block.gate.out_features
        gate = self._linear(block.gate, x, f"{node}/gate_proj")
        up = self._linear(block.up, x, f"{node}/up_proj")
        if any(linear.name in self.islands.shifts for linear in (block.gate, block.up, block.down)):
            gate, up = self.precision.wide(gate), self.precision.wide(up)
        sigmoid = self.builder.op("Sigmoid", [gate], name=f"{node}/Sigmoid", dtype=_dtype(gate), shape=self._shape(ffn))
        silu = self._binary("Mul", gate, sigmoid, f"{node}/SiLU", ffn)
        gated = self._binary("Mul", silu, up, f"{node}/Mul", ffn)
        return self._linear(block.down, gated, f"{node}/down_proj")

    def _linear(self, linear: Linear, x: ir.Value, node: str) -> ir.Value:
        """linear(x) in the graph's dtype, or in float32 where the linear is an island."""
        shift = self.islands.shifts.get(linear.name)
        if shift is None:
            return lower_linear(self.linears, linear, self.precision.narrow(x), node)
        small = lower_linear(self.linears, linear, self.precision.narrow(x, shift), node, biased=False)
        y = self.precision.scaled(self.precision.wide(small), shift)
        if not linear.bias:
            return y
        self.weights.expect(f"{linear.name}.bias", (linear.out_features,))
        bias = self.precision.wide(self.builder.initializer(self.weights.tensor(f"{linear.name}.bias")))
        return self._binary("Add", y, bias, f"{node}/bias_outside", linear.out_features)

    def _stream(self, x: ir.Value) -> ir.Value:
        """``x`` in the dtype of the residual stream."""
        return self.precision.wide(x) if self.islands.residual else self.precision.narrow(x)

    def _head(self, x: ir.Value) -> ir.Value:
        d, b = self.decoder, self.builder
        shape: list[Dim] = ["batch", 1, d.vocab_size]
        weight = d.embedding if d.head is None else f"{d.head.name}.weight"
        shift = self.islands.shifts.get(HEAD, 0)
        x = self.precision.narrow(x, shift)
        if d.head is not None and not is_dense(self.linears, [d.head]):
            logits = lower_linear(self.linears, d.head, x, "/lm_head")
        else:
            self.weights.expect(weight, (d.vocab_size, d.hidden_size))
            table = b.initializer(self.weights.tensor(weight))
            logits = self._product_with_rows(x, table, shape)
            if d.head is not None:
                self.linears.forms[d.head.name] = "dense"
        float32 = ir.DataType.FLOAT
        if self.dtype != float32:
            logits = b.op("Cast", [logits], name="/lm_head/Cast", dtype=float32, shape=shape, to=float32)
        return self.precision.scaled(logits, shift) if shift else logits

    def _product_with_rows(self, x: ir.Value, table: ir.Value, shape: list[Dim]) -> ir.Value:
        """X (batch, 1, hidden) times the rows of ``table`` (vocab, hidden), which stays in its stored layout."""
        d, b = self.decoder, self.builder
        if self.linears.fused_transpose:
            return b.op(
                "FusedMatMul", [x, table], name="/lm_head/MatMul", dtype=self.dtype, shape=shape,
                domain=MICROSOFT_DOMAIN, transB=1,
            )  # fmt: skip
        rows = b.op(
            "Reshape", [x, b.constant(np.array([-1, d.hidden_size]), "rows_of_hidden")], name="/lm_head/rows",
            dtype=self.dtype, shape=["rows", d.hidden_size],
        )  # fmt: skip
        flat = b.op(
            "Gemm", [rows, table], name="/lm_head/Gemm", dtype=self.dtype, shape=["rows", d.vocab_size], transB=1
        )
        int64 = ir.DataType.INT64
        lead = self._leading(x)
        vocab = b.constant(np.array([d.vocab_size]), "vocab_size")
        full = b.op("Concat", [lead, vocab], name="/lm_head/shape", dtype=int64, shape=[3], axis=0)
        return b.op("Reshape", [flat, full], name="/lm_head/Reshape", dtype=self.dtype, shape=shape)

    def _leading(self, x: ir.Value) -> ir.Value:
        """The first two sizes of ``x``; TensorRT's older parsers do not read a range from Shape itself."""
        b, int64, name = self.builder, ir.DataType.INT64, "/lm_head/leading"
        if not self.dialect.typed:
            return b.op("Shape", [x], name=name, dtype=int64, shape=[2], start=0, end=2)
        sizes = b.op("Shape", [x], name=f"{name}_shape", dtype=int64, shape=[3])
        return b.op("Gather", [sizes, b.constant(np.array([0, 1]), "first_two")], name=name, dtype=int64, shape=[2])

    def _norm(self, x: ir.Value, weight: str, node: str) -> ir.Value:
        """RMS norm; its statistics are float32 whatever the graph's dtype (stash_type 1)."""
        self.weights.expect(weight, (self.decoder.hidden_size,))
        return self._rms(x, weight, node)

    def _head_norm(self, x: ir.Value, weight: str | None, heads: int, node: str) -> ir.Value:
        """RMS norm of every head's query or key, where the family has one."""
        if weight is None:
            return x
        b, dim = self.builder, self.decoder.head_dim
        self.weights.expect(weight, (dim,))
        split: list[Dim] = ["batch", "seq", heads, dim]
        apart = b.op(
            "Reshape", [x, b.constant(np.array([0, 0, heads, dim]), f"split_{heads}_heads")], name=f"{node}/split",
            dtype=_dtype(x), shape=split,
        )  # fmt: skip
        normed = self.precision.narrow(self._rms(apart, weight, node))
        return b.op(
            "Reshape", [normed, b.constant(np.array([0, 0, heads * dim]), f"join_{heads}_heads")],
            name=f"{node}/join", dtype=self.dtype, shape=self._shape(heads * dim),
        )  # fmt: skip

    def _rms(self, x: ir.Value, weight: str, node: str) -> ir.Value:
        """In the graph's dtype or in float32, as the dialect's norm leaves it."""
        scale = self.builder.initializer(self.weights.tensor(weight))
        return NORMS[self.dialect.norm](self.builder, self.precision, x, scale, self.decoder.norm_eps, node)

    def _binary(self, op_type: str, a: ir.Value, b: ir.Value, node: str, features: int) -> ir.Value:
        return self.builder.op(op_type, [a, b], name=node, dtype=_dtype(a), shape=self._shape(features))


def _dtype(x: ir.Value) -> ir.DataType:
    assert x.dtype is not None  # the builder gives every value a dtype
    return x.dtype


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[-1]
