"""ONNX Runtime's GroupQueryAttention: past and present in one buffer."""

from __future__ import annotations

import onnx_ir as ir

from mixt_export.errors import UnsupportedError
from mixt_export.families.wiring import Block
from mixt_export.lower.attention.interface import Cache, Heads, Inputs, int64
from mixt_export.lower.builder import MICROSOFT_DOMAIN, Dim

#: ONNX Runtime's kernel refuses other head sizes when it runs (not when it loads).
_GQA_HEAD_MULTIPLE = 16


class SharedBufferAttention:
    """com.microsoft GroupQueryAttention: rotary inside, past and present in one buffer, sequences right-padded."""

    packs_qkv = True

    def __init__(self, inputs: Inputs) -> None:
        if inputs.decoder.head_dim % _GQA_HEAD_MULTIPLE:
            raise UnsupportedError(
                f"config.json: head_dim {inputs.decoder.head_dim} is not a multiple of {_GQA_HEAD_MULTIPLE}, which "
                "ONNX Runtime's GroupQueryAttention needs with rotary embeddings; export with --target onnx."
            )
        self._in = inputs
        b, mask = inputs.builder, inputs.attention_mask
        one = b.constant(int64(1), "one")
        count = b.op(
            "ReduceSum",
            [mask, one],
            name="/attention/valid_count",
            dtype=ir.DataType.INT64,
            shape=["batch"],
            keepdims=0,
        )
        self._last = b.op("Sub", [count, one], name="/attention/last_index", dtype=ir.DataType.INT64, shape=["batch"])
        self._seqlens = b.op(
            "Cast", [self._last], name="/attention/seqlens_k", dtype=ir.DataType.INT32, shape=["batch"],
            to=ir.DataType.INT32,
        )  # fmt: skip
        length = b.op("Shape", [mask], name="/attention/mask_length", dtype=ir.DataType.INT64, shape=[1], start=1)
        scalar = b.op("Squeeze", [length], name="/attention/total", dtype=ir.DataType.INT64, shape=[])
        self._total = b.op(
            "Cast", [scalar], name="/attention/total_length", dtype=ir.DataType.INT32, shape=[], to=ir.DataType.INT32
        )
        self._cos, self._sin = inputs.rotary_tables()

    def attend(self, block: Block, heads: Heads, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        """See Attention.attend."""
        d, b = self._in.decoder, self._in.builder
        present: list[Dim] = ["batch", d.kv_heads, "present", d.head_dim]
        window = {} if block.window is None else {"local_window_size": block.window}
        out, key, value = b.ops(
            "GroupQueryAttention",
            [heads.q, heads.k, heads.v, past.key, past.value, self._seqlens, self._total, self._cos, self._sin],
            name=f"{node}/GroupQueryAttention",
            domain=MICROSOFT_DOMAIN,
            outputs=[
                (self._in.dtype, ["batch", "seq", d.heads * d.head_dim]),
                (self._in.dtype, present),
                (self._in.dtype, present),
            ],
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=d.head_dim**-0.5,
            **window,
        )
        return out, Cache(key, value)

    def last_position(self, hidden: ir.Value, node: str) -> ir.Value:
        """Index min(valid - 1, seq - 1): the first covers a right-padded prefill, the second decoding with a past."""
        b, d = self._in.builder, self._in.decoder
        one = b.constant(int64(1), "one")
        seq = b.op("Shape", [self._in.input_ids], name="/lm_head/seq", dtype=ir.DataType.INT64, shape=[1], start=1)
        end = b.op("Sub", [seq, one], name="/lm_head/seq_end", dtype=ir.DataType.INT64, shape=[1])
        index = b.op("Min", [self._last, end], name="/lm_head/index", dtype=ir.DataType.INT64, shape=["batch"])
        indices = b.op(
            "Unsqueeze", [index, b.constant(int64(1, 2), "axes_1_2")], name="/lm_head/indices",
            dtype=ir.DataType.INT64, shape=["batch", 1, 1],
        )  # fmt: skip
        return b.op(
            "GatherND", [hidden, indices], name=node, dtype=self._in.dtype, shape=["batch", 1, d.hidden_size],
            batch_dims=1,
        )  # fmt: skip
