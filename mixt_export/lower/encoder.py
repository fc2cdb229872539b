"""Lower a whole encoder: embeddings, post-norm blocks, and the sentence embedding that retrieval asks for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mixt_export import __version__
from mixt_export.checkpoints import Checkpoint
from mixt_export.families.encoder_wiring import Encoder, EncoderBlock
from mixt_export.families.wiring import Norm
from mixt_export.lower.builder import MICROSOFT_DOMAIN, Dim, GraphBuilder
from mixt_export.lower.context import Context
from mixt_export.lower.decoder import LoweredModel
from mixt_export.lower.dialects import Dialect, check_dialect
from mixt_export.lower.linear import LinearContext
from mixt_export.lower.mlp.activations import ACTIVATIONS
from mixt_export.lower.precision import Islands, Precision
from mixt_export.lower.weights import DTYPES, Weights
from mixt_export.network import FactorizedLinear
from mixt_export.plan import FormPlan, choose_forms

_FLOAT, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
_TINY = 1e-12
"""Below this a mean of states is no direction: torch.nn.functional.normalize's own floor."""


def encoder_factors(encoder: Encoder, checkpoint: Checkpoint) -> list[FactorizedLinear]:
    """The factorised linears of ``encoder``, in the order of execution."""
    found = [checkpoint.factors.get(linear.name) for linear in encoder.linears]
    return [factors for factors in found if factors is not None]


def lower_encoder(
    encoder: Encoder, checkpoint: Checkpoint, dialect: Dialect, *, dtype: str, plan: FormPlan | None = None
) -> LoweredModel:
    """Build the graph of ``encoder`` with the weights of ``checkpoint``; no weight is read.

    Inputs: input_ids and attention_mask, int64 (batch, seq), and token_type_ids where the model tells segments apart.
    Outputs, float32: last_hidden_state (batch, seq, hidden), and sentence_embedding (batch, hidden), the mean of the
    states of the tokens that the mask keeps, scaled to length 1. dtype: "float32" or "float16", of weights and
    activations. plan: executable forms of the factorised linears, by default those of `choose_forms`.
    Raises CheckpointError when a tensor is missing or has another shape than config.json implies.
    """
    if plan is None:
        plan = choose_forms(encoder_factors(encoder, checkpoint))
    return _Lowering(encoder, Weights(checkpoint, dtype), dialect, plan).run()


class _Lowering:
    def __init__(self, encoder: Encoder, weights: Weights, dialect: Dialect, plan: FormPlan) -> None:
        self.encoder, self.weights, self.dialect = encoder, weights, dialect
        self.dtype = DTYPES[weights.dtype]
        self.builder = builder = GraphBuilder("model", dialect.opset, dialect.ir_version)
        fused = MICROSOFT_DOMAIN in dialect.operators and weights.dtype == "float32"
        linears = LinearContext(builder, weights, fused, {}, plan.choices, einsum=plan.einsum, sharing=plan.sharing)
        precision = Precision(builder, self.dtype)
        self.context = Context(builder, weights, dialect, precision, Islands(), linears)
        grid: list[Dim] = ["batch", "seq"]
        self.input_ids = self.builder.input("input_ids", _INT64, grid)
        self.attention_mask = self.builder.input("attention_mask", _INT64, grid)
        self.segments = self.builder.input("token_type_ids", _INT64, grid) if encoder.token_types > 1 else None

    def run(self) -> LoweredModel:
        x, mask = self._embed(), self._mask()
        for block in self.encoder.blocks:
            x = self._block(block, x, mask)
        states = self.context.precision.wide(x)
        if states is x:  # the last block's output keeps its own name
            width = self._shape(self.encoder.hidden_size)
            states = self.builder.op("Identity", [x], name="/encoder/states", dtype=_FLOAT, shape=width)
        embedding = self._pooled(states)
        self.builder.output(states, "last_hidden_state")
        self.builder.output(embedding, "sentence_embedding")
        written = {
            "mixt.dialect": self.dialect.name,
            "mixt.dtype": self.weights.dtype,
            "mixt.version": __version__,
        }
        model = self.builder.model(written, __version__)
        check_dialect(model, self.dialect)
        return LoweredModel(model, self.weights, self.context.linears.forms)

    def _embed(self) -> ir.Value:
        e, width = self.encoder, self._shape(self.encoder.hidden_size)
        words = self._rows(e.word_embedding, e.vocab_size, self.input_ids, "/embeddings/words", width)
        shape: list[Dim] = width if e.pad_positions is not None else ["seq", e.hidden_size]
        places = self._rows(e.position_embedding, e.position_rows, self._positions(), "/embeddings/positions", shape)
        if e.token_types:
            kinds = self._segments(width)
            words = self.context.binary("Add", words, kinds, "/embeddings/with_segments")
        x = self.context.binary("Add", words, places, "/embeddings/sum")
        return self._normed(x, e.embedding_norm, "/embeddings/norm")

    def _segments(self, width: list[Dim]) -> ir.Value:
        """Embeddings of the token types; of the only one, row 0, where the model has no more."""
        e = self.encoder
        if self.segments is not None:
            return self._rows(e.token_type_embedding, e.token_types, self.segments, "/embeddings/segments", width)
        zero = self.builder.constant(np.array([0]), "zero")
        return self._rows(e.token_type_embedding, e.token_types, zero, "/embeddings/segment", [1, e.hidden_size])

    def _rows(self, weight: str, rows: int, indices: ir.Value, node: str, shape: list[Dim]) -> ir.Value:
        self.weights.expect(weight, (rows, self.encoder.hidden_size))
        table = self.builder.initializer(self.weights.tensor(weight))
        return self.builder.op("Gather", [table, indices], name=node, dtype=self.dtype, shape=shape)

    def _positions(self) -> ir.Value:
        """Token i has position i, (seq,); RoBERTa counts the tokens that are no padding, (batch, seq)."""
        b, pad = self.builder, self.encoder.pad_positions
        if pad is None:
            seq = b.op("Shape", [self.input_ids], name="/positions/seq", dtype=_INT64, shape=[1], start=1)
            end = b.op("Squeeze", [seq], name="/positions/end", dtype=_INT64, shape=[])
            zero, one = (b.constant(np.array(v, np.int64), f"scalar_{v}") for v in (0, 1))
            return b.op("Range", [zero, end, one], name="/positions/ids", dtype=_INT64, shape=["seq"])
        grid: list[Dim] = ["batch", "seq"]
        filler = b.constant(np.array(pad, np.int64), "pad_token_id")
        empty = b.op("Equal", [self.input_ids, filler], name="/positions/is_pad", dtype=_BOOL, shape=grid)
        full = b.op("Not", [empty], name="/positions/is_token", dtype=_BOOL, shape=grid)
        counted = b.op("Cast", [full], name="/positions/tokens", dtype=_INT64, shape=grid, to=_INT64)
        axis = b.constant(np.array(1, np.int64), "axis_1")
        count = b.op("CumSum", [counted, axis], name="/positions/count", dtype=_INT64, shape=grid)
        where = b.op("Mul", [count, counted], name="/positions/of_tokens", dtype=_INT64, shape=grid)
        return b.op("Add", [where, filler], name="/positions/ids", dtype=_INT64, shape=grid)

    def _mask(self) -> ir.Value:
        """Keys that queries may look at, bool (batch, 1, seq, seq)."""
        b = self.builder
        row: list[Dim] = ["batch", 1, 1, "seq"]
        axes = b.constant(np.array([1, 2]), "axes_1_2")
        wide = b.op("Unsqueeze", [self.attention_mask, axes], name="/mask/rows", dtype=_INT64, shape=row)
        valid = b.op("Cast", [wide], name="/mask/valid", dtype=_BOOL, shape=row, to=_BOOL)
        seq = b.op("Shape", [self.input_ids], name="/mask/seq", dtype=_INT64, shape=[1], start=1)
        one = b.constant(np.array([1]), "one")
        shape = b.op("Concat", [one, one, seq, one], name="/mask/shape", dtype=_INT64, shape=[4], axis=0)
        return b.op("Expand", [valid, shape], name="/mask/full", dtype=_BOOL, shape=["batch", 1, "seq", "seq"])

    def _block(self, block: EncoderBlock, x: ir.Value, mask: ir.Value) -> ir.Value:
        e, node, context = self.encoder, f"/encoder/layer.{block.index}", self.context
        q, k, v = context.group((block.q, block.k, block.v), x, f"{node}/attention")
        mixed = self.builder.op(
            "Attention", [q, k, v, mask], name=f"{node}/attention/Attention", dtype=self.dtype,
            shape=self._shape(e.hidden_size), q_num_heads=e.heads, kv_num_heads=e.heads, scale=e.head_dim**-0.5,
            is_causal=0,
        )  # fmt: skip
        attended = context.linear(block.o, mixed, f"{node}/attention/output")
        middle = context.binary("Add", attended, x, f"{node}/attention/residual")
        middle = self._normed(middle, block.attention_norm, f"{node}/attention/norm")
        inner = context.linear(block.mlp.up, middle, f"{node}/mlp/up")
        bent = ACTIVATIONS[block.mlp.activation](context, inner, f"{node}/mlp")
        changed = context.linear(block.mlp.down, bent, f"{node}/mlp/down")
        y = self._normed(
            context.binary("Add", changed, middle, f"{node}/mlp/residual"), block.output_norm, f"{node}/norm"
        )
        y.name = f"{node}/output"
        return y

    def _normed(self, x: ir.Value, norm: Norm, node: str) -> ir.Value:
        return self.context.precision.narrow(self.context.norm(norm, x, node))

    def _pooled(self, states: ir.Value) -> ir.Value:
        """Mean over the tokens that the mask keeps, of length 1. The number of tokens cancels out: a sum does."""
        b, hidden = self.builder, self.encoder.hidden_size
        total: list[Dim] = ["batch", hidden]
        last, middle = b.constant(np.array([-1]), "last_axis"), b.constant(np.array([1]), "axes_1")
        column = b.op(
            "Unsqueeze", [self.attention_mask, last], name="/pooling/column", dtype=_INT64, shape=["batch", "seq", 1]
        )
        weight = b.op("Cast", [column], name="/pooling/weight", dtype=_FLOAT, shape=["batch", "seq", 1], to=_FLOAT)
        kept = b.op("Mul", [states, weight], name="/pooling/kept", dtype=_FLOAT, shape=self._shape(hidden))
        summed = b.op("ReduceSum", [kept, middle], name="/pooling/sum", dtype=_FLOAT, shape=total, keepdims=0)
        square = b.op("Mul", [summed, summed], name="/pooling/square", dtype=_FLOAT, shape=total)
        length = b.op(
            "ReduceSum", [square, last], name="/pooling/squares", dtype=_FLOAT, shape=["batch", 1], keepdims=1
        )
        root = b.op("Sqrt", [length], name="/pooling/length", dtype=_FLOAT, shape=["batch", 1])
        floor = b.constant(np.array(_TINY, np.float32), "smallest_length")
        safe = b.op("Max", [root, floor], name="/pooling/safe_length", dtype=_FLOAT, shape=["batch", 1])
        return b.op("Div", [summed, safe], name="/pooling/embedding", dtype=_FLOAT, shape=total)

    def _shape(self, features: int) -> list[Dim]:
        return ["batch", "seq", features]
