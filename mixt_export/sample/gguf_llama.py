"""Read a Llama model from a GGUF file: names, shapes and float32 weights in the layout of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.errors import CheckpointError
from mixt_export.optional import require

_ROWS = 4096

#: Parts of a layer, transformers name -> GGUF name, in the order of the file: q, k, v and gate, up are neighbours, so
#: that each group of (out, in) matrices with one input can be addressed as a single stacked matrix in place.
LAYER_PARTS = {
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


@dataclass(frozen=True)
class Source:
    """One tensor: its ``name`` in transformers, ``origin`` in the GGUF file; ``heads`` > 0 where rows are permuted."""

    name: str
    origin: str
    heads: int = 0


class GgufLlama:
    """A Llama model in the GGUF file ``path`` (memory-mapped). Raises CheckpointError when it is something else."""

    def __init__(self, path: Path) -> None:
        self._gguf = require("gguf", "making the sample model")
        try:
            self._reader = self._gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise CheckpointError(f"{path}: is not a readable GGUF file ({error}); download it again.") from error
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if self.value("general.architecture") != "llama":
            raise CheckpointError(f"{path}: holds no llama model; download it again.")

    def value(self, key: str) -> Any:
        """The metadata value of ``key``: a str, int, float, bool or list of these."""
        field = self._reader.get_field(key)
        if field is None:
            raise CheckpointError(f"{self.path}: the GGUF file lacks the key {key}; download it again.")
        return field.contents()

    def sources(self) -> list[Source]:
        """All tensors in the order in which they are written; the output projection is tied to the embedding."""
        heads = {
            "attn_q": int(self.value("llama.attention.head_count")),
            "attn_k": int(self.value("llama.attention.head_count_kv")),
        }
        found = [Source("model.embed_tokens.weight", "token_embd.weight")]
        for layer in range(int(self.value("llama.block_count"))):
            found += [
                Source(f"model.layers.{layer}.{part}.weight", f"blk.{layer}.{origin}.weight", heads.get(origin, 0))
                for part, origin in LAYER_PARTS.items()
            ]
        found.append(Source("model.norm.weight", "output_norm.weight"))
        used = {source.origin for source in found}
        if used != set(self._tensors):
            odd = sorted(used ^ set(self._tensors))[0]
            raise CheckpointError(f"{self.path}: the tensor {odd} is missing or unknown; download the file again.")
        return found

    def shape(self, source: Source) -> tuple[int, ...]:
        """Shape (out, in) of a matrix or (features,) of a norm; GGUF lists sizes innermost first."""
        return tuple(int(size) for size in reversed(self._tensors[source.origin].shape))

    def pieces(self, source: Source) -> Iterator[NDArray[np.float32]]:
        """The float32 values of one tensor as runs of rows, so that a large embedding is never whole in memory."""
        tensor = self._tensors[source.origin]
        step = len(tensor.data) if source.heads else _ROWS
        for start in range(0, len(tensor.data), step):
            rows = self._gguf.dequantize(tensor.data[start : start + step], tensor.tensor_type)
            yield unpermute_rows(rows, source.heads) if source.heads else rows


def unpermute_rows(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order of q and k: within a head, rows (pair, half) become (half, pair).

    ``weight`` is (heads * head_dim, in). llama.cpp rotates neighbouring rows (2i, 2i + 1), transformers rows
    (i, i + head_dim/2); its converter therefore interleaves the halves (``permute`` in convert_hf_to_gguf.py).
    """
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows, columns)
