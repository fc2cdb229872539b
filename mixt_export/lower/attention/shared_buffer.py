"""ONNX Runtime's GroupQueryAttention: past and present in one buffer."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from mixt_export.errors import UnsupportedError
from mixt_export.families.wiring import Block, Decoder
from mixt_export.lower.attention.interface import Cache, Heads, Inputs, int64
from mixt_export.lower.builder import MICROSOFT_DOMAIN, Dim
from mixt_export.quantisation.cache import PARTS, CacheScales

#: What ONNX Runtime's kernel wants head sizes to be multiples of, and all sizes where heads rotate.
_HEAD_MULTIPLE, _ROTARY_MULTIPLE = 8, 16
#: The operator's first input of two with scales of the cache.
_SCALES = 12


class SharedBufferAttention:
    """com.microsoft GroupQueryAttention: rotary inside, past and present in one buffer, sequences right-padded."""

    packs_qkv = True

    def __init__(self, inputs: Inputs) -> None:
        _check_sizes(inputs.decoder)
        self._in = inputs
        b, mask = inputs.builder, inputs.attention_mask
        one = b.constant(int64(1), "one")
        self._count = count = b.op(
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
        self._tables = {rope: inputs.rotary_tables(rope, inputs.dtype) for rope in inputs.decoder.ropes}

    def positions(self) -> ir.Value:
        """max(valid - seq, 0) + index: of a right-padded prefill, of decoding, of a prompt's next piece at batch 1."""
        b, int64_, grid = self._in.builder, ir.DataType.INT64, ["batch", "seq"]
        one, zero = b.constant(int64(1), "one"), b.constant(int64(0), "zero")
        seq = b.op("Shape", [self._in.input_ids], name="/position/seq", dtype=int64_, shape=[1], start=1)
        before = b.op("Sub", [self._count, seq], name="/position/before", dtype=int64_, shape=["batch"])
        start = b.op("Max", [before, zero], name="/position/start", dtype=int64_, shape=["batch"])
        column = b.op("Unsqueeze", [start, one], name="/position/column", dtype=int64_, shape=["batch", 1])
        end = b.op("Squeeze", [seq], name="/position/end", dtype=int64_, shape=[])
        first, step = (b.constant(np.array(v, dtype=np.int64), f"scalar_{v}") for v in (0, 1))
        index = b.op("Range", [first, end, step], name="/position/index", dtype=int64_, shape=["seq"])
        return b.op("Add", [column, index], name="/position/ids", dtype=int64_, shape=grid)

    def attend(self, block: Block, heads: Heads, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        """See Attention.attend."""
        d, b, attention = self._in.decoder, self._in.builder, block.attention
        rope = attention.rope
        present: list[Dim] = ["batch", d.kv_heads, "present", d.head_dim]
        window = {} if attention.window is None else {"local_window_size": attention.window}
        softcap = {} if attention.softcap is None else {"softcap": attention.softcap}
        inputs: list[ir.Value | None] = [heads.q, heads.k, heads.v, past.key, past.value, self._seqlens, self._total]
        inputs += () if rope is None else self._tables[rope]
        kept = {}
        if self._in.int8_cache is not None:
            inputs += [None] * (_SCALES - len(inputs))
            inputs += self._scales(self._in.int8_cache, d.blocks.index(block))
            kept = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        out, key, value = b.ops(
            "GroupQueryAttention",
            inputs,
            name=f"{node}/GroupQueryAttention",
            domain=MICROSOFT_DOMAIN,
            outputs=[
                (self._in.dtype, ["batch", "seq", d.heads * d.head_dim]),
                (self._in.cache_dtype, present),
                (self._in.cache_dtype, present),
            ],
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            do_rotary=int(rope is not None),
            rotary_interleaved=int(rope is not None and rope.interleaved),
            scale=attention.scale,
            **window,
            **softcap,
            **kept,
        )
        return out, Cache(key, value)

    def _scales(self, scales: CacheScales, layer: int) -> list[ir.Value]:
        """(1, kv_heads, 1, head_dim) of keys and of values; their numbers are read when the graph is written."""
        d, found = self._in.decoder, []
        for part in PARTS:
            tensor = self._in.weights.packed(
                f"/attention/{layer}/{part}_scale",
                (1, d.kv_heads, 1, d.head_dim),
                "float32",
                partial(scales.of, layer, part),
            )
            found.append(self._in.builder.initializer(tensor))
        return found

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


def _check_sizes(decoder: Decoder) -> None:
    """Raise UnsupportedError for sizes that ONNX Runtime's kernel refuses when it runs, not when it loads."""
    rotary = {rope.rotary_dim for rope in decoder.ropes}
    wanted = _ROTARY_MULTIPLE if rotary else _HEAD_MULTIPLE
    sizes = [("head_dim", decoder.head_dim), *(("the rotary dimension", size) for size in rotary)]
    for name, size in sizes:
        if size % wanted:
            raise UnsupportedError(
                f"config.json: {name} {size} is not a multiple of {wanted}, which ONNX Runtime's GroupQueryAttention "
                f"needs{' with rotary embeddings' if rotary else ''}; export with --target onnx."
            )
