"""Lower a whole decoder: embedding, blocks, final norm, head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mixt_export import __version__
from mixt_export.checkpoints import Checkpoint
from mixt_export.families import wiring
from mixt_export.families.wiring import Block, Decoder, MoeMlp, Norm
from mixt_export.lower.attention import ATTENTIONS, Attention, Cache, Heads, Inputs
from mixt_export.lower.builder import MICROSOFT_DOMAIN, Dim, GraphBuilder
from mixt_export.lower.context import Context, stem
from mixt_export.lower.dialects import Dialect, check_dialect
from mixt_export.lower.elementwise import type_of
from mixt_export.lower.embedding import embed
from mixt_export.lower.head import head
from mixt_export.lower.linear import LinearContext, lower_dense, packs_in_place
from mixt_export.lower.mlp import lower_mlp
from mixt_export.lower.mlp.experts import run_as_stored
from mixt_export.lower.precision import Islands, Precision, dims
from mixt_export.lower.variants import few_tokens
from mixt_export.lower.weights import DTYPES, Weights
from mixt_export.network import FactorizedLinear
from mixt_export.plan import FormPlan, choose_forms
from mixt_export.quantisation.cache import CacheScales


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
    int8_cache: CacheScales | None = None,
) -> LoweredModel:
    """Build the graph of ``decoder`` with the weights of ``checkpoint``; no weight is read.

    dtype: "float32", "float16" or "bfloat16", of weights and activations; norm statistics are computed and logits
    returned in float32. max_seq_len: positions in the rotary tables. islands: what a typed dialect computes in float32
    besides. plan: executable forms of the MixT linears, by default those of `choose_forms`. int8_cache: keys and values
    are cached at 8 bits with these scales (dialect ort).
    Raises CheckpointError when a tensor is missing or has another shape than config.json implies.
    """
    if plan is None:
        plan = choose_forms(factors_of(decoder, checkpoint, dialect))
    lowering = _Lowering(decoder, Weights(checkpoint, dtype), dialect, max_seq_len, islands, plan, int8_cache)
    return lowering.run()


def factors_of(decoder: Decoder, checkpoint: Checkpoint, dialect: Dialect | None = None) -> list[FactorizedLinear]:
    """The factorised linears of ``decoder`` whose forms are planned, in the order of execution.

    Not among them: experts whose factors ``dialect`` runs as they are stored, see lower.mlp.experts.
    """
    mlps = [block.mlp for block in decoder.blocks if isinstance(block.mlp, MoeMlp)]
    stored = {name for mlp in mlps for name in run_as_stored(mlp, checkpoint.factors, dialect)}
    found = [checkpoint.factors.get(linear.name) for linear in decoder.linears if linear.name not in stored]
    return [factors for factors in found if factors is not None]


class _Lowering:
    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        dialect: Dialect,
        max_seq_len: int,
        islands: Islands,
        plan: FormPlan,
        int8_cache: CacheScales | None,
    ) -> None:
        self.decoder = decoder
        dtype = DTYPES[weights.dtype]
        self.builder = builder = GraphBuilder("model", dialect.opset, dialect.ir_version)
        self.precision = Precision(builder, dtype)
        fused = MICROSOFT_DOMAIN in dialect.operators and weights.dtype == "float32"
        linears = LinearContext(
            builder,
            weights,
            fused,
            {},
            plan.choices,
            einsum=plan.einsum,
            flat=dialect.typed,
            kernels=dialect.kernels,
            sharing=plan.sharing,
        )
        self.context = Context(builder, weights, dialect, self.precision, islands, linears)
        int64 = ir.DataType.INT64
        self.input_ids = builder.input("input_ids", int64, ["batch", "seq"])
        if plan.many:
            linears.many, linears.few_tokens = plan.many, few_tokens(builder, self.input_ids, plan.switch)
        mask = builder.input("attention_mask", int64, ["batch", "total"])
        kind = dtype if int8_cache is None else ir.DataType.INT8
        cache: list[Dim] = ["batch", decoder.kv_heads, "past", decoder.head_dim]
        self.past = [
            Cache(*(builder.input(f"past_key_values.{i}.{part}", kind, cache) for part in ("key", "value")))
            for i in range(len(decoder.blocks))
        ]
        self.attention: Attention = ATTENTIONS[dialect.name](
            Inputs(builder, weights, decoder, self.input_ids, mask, max_seq_len, self.precision, islands, int8_cache)
        )

    def run(self) -> LoweredModel:
        context, decoder = self.context, self.decoder
        x = self._stream(embed(context, decoder, self.input_ids, self.attention.positions))
        present = []
        for block, past in zip(decoder.blocks, self.past, strict=True):
            x, new = self._block(block, x, past)
            present.append(new)
        normed = context.norm(decoder.final_norm, x, f"/model/{decoder.final_norm.stem}")
        self.builder.output(
            head(context, decoder, self.attention.last_position(normed, "/lm_head/last_position")), "logits"
        )
        for index, cache in enumerate(present):
            self.builder.output(cache.key, f"present.{index}.key")
            self.builder.output(cache.value, f"present.{index}.value")
        dialect = context.dialect
        model = self.builder.model({"mixt.dialect": dialect.name, "mixt.version": __version__}, __version__)
        check_dialect(model, dialect)
        return LoweredModel(model, context.weights, context.linears.forms)

    def _block(self, block: Block, x: ir.Value, past: Cache) -> tuple[ir.Value, Cache]:
        node = f"/model/layers.{block.index}"
        read = self._norm(block.attention_norm, x, node)
        attended, cache = self._attention(block, read, past, f"{node}/self_attn")
        attended = self._branch(block, block.post_attention_norm, attended, node, "self_attn")
        middle = self.context.binary("Add", x, attended, f"{node}/self_attn/residual")
        if not (block.parallel and block.mlp_norm is None):
            read = self._norm(block.mlp_norm, x if block.parallel else middle, node)
        mlp = lower_mlp(self.context, block.mlp, read, f"{node}/mlp")
        mlp = self._branch(block, block.post_mlp_norm, mlp, node, "mlp")
        y = self.context.binary("Add", middle, mlp, f"{node}/mlp/residual")
        y.name = f"{node}/output"
        return y, cache

    def _norm(self, norm: Norm | None, x: ir.Value, node: str) -> ir.Value:
        return x if norm is None else self.context.norm(norm, x, f"{node}/{norm.stem}")

    def _branch(self, block: Block, norm: Norm | None, x: ir.Value, node: str, name: str) -> ir.Value:
        """What is added to the stream, in its dtype."""
        normed = self._norm(norm, x, node)
        return self._stream(self.context.scaled(normed, block.branch_scale, f"{node}/{name}/branch_scale"))

    def _attention(self, block: Block, x: ir.Value, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        attention = block.attention
        out, cache = self.attention.attend(block, self._heads(attention, x, node), past, node)
        return self.context.linear(attention.o, out, f"{node}/{stem(attention.o.name)}"), cache

    def _heads(self, attention: wiring.Attention, x: ir.Value, node: str) -> Heads:
        linears, qkv = self.context.linears, attention.qkv
        packs = self.attention.packs_qkv and attention.q_norm is None
        if len(qkv) == 1:
            packed = self.context.linear(qkv[0], x, f"{node}/{stem(qkv[0].name)}")
            if packs:
                return Heads(packed, None, None)
            d = self.decoder
            sizes = [count * d.head_dim for count in (d.heads, d.kv_heads, d.kv_heads)]
            q, k, v = self.context.parts(packed, sizes, f"{node}/qkv")
        elif packs and packs_in_place(linears, qkv):
            return Heads(lower_dense(linears, qkv, x, f"{node}/qkv_proj"), None, None)
        else:
            q, k, v = self.context.group(qkv, x, node)
        q = self._head_norm(q, attention, attention.q_norm, self.decoder.heads, node)
        k = self._head_norm(k, attention, attention.k_norm, self.decoder.kv_heads, node)
        return Heads(q, k, v)

    def _head_norm(
        self, x: ir.Value, attention: wiring.Attention, norm: Norm | None, heads: int, node: str
    ) -> ir.Value:
        """Norm of every head's query or key, or of all at once, where the family has one."""
        if norm is None:
            return x
        b, dim, node = self.builder, self.decoder.head_dim, f"{node}/{norm.stem}"
        if attention.norm_all_heads:
            return self.precision.narrow(self.context.norm(norm, x, node))
        split: list[Dim] = ["batch", "seq", heads, dim]
        apart = b.op(
            "Reshape", [x, b.constant(np.array([0, 0, heads, dim]), f"split_{heads}_heads")], name=f"{node}/split",
            dtype=type_of(x), shape=split,
        )  # fmt: skip
        normed = self.precision.narrow(self.context.norm(norm, apart, node))
        return b.op(
            "Reshape", [normed, b.constant(np.array([0, 0, heads * dim]), f"join_{heads}_heads")],
            name=f"{node}/join", dtype=type_of(normed), shape=dims(x),
        )  # fmt: skip

    def _stream(self, x: ir.Value) -> ir.Value:
        """``x`` in the dtype of the residual stream."""
        return self.precision.wide(x) if self.context.islands.residual else self.precision.narrow(x)
