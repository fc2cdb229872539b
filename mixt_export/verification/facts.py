"""What an exported folder says about itself, beside what its graph and its model folder say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import companion
from mixt_export.checkpoints.strictjson import load_object
from mixt_export.verification.graph import ExportedGraph
from mixt_export.verification.memory.weights import count_weights

#: One claim: where it stands, what it says, what is true.
Claim = tuple[str, Any, Any]

#: Bytes of shapes, scalars and bodies of branches, which are counted in one place and not in another.
_SMALL = 1 << 16
_TABLES = ("/cos", "/sin")


def claims(
    graph: ExportedGraph, manifest: Mapping[str, Any], reference: Path, config: Mapping[str, Any]
) -> Iterator[Claim]:
    """Facts of ``manifest`` that the graph or the model folder ``reference`` (``config``: its config.json) decide."""
    kv, model, memory = (_object(manifest, key) for key in ("kv", "model", "memory"))
    proto = graph.proto
    opset = next((entry.version for entry in proto.opset_import if not entry.domain), 0)
    right = graph.dialect == "ort"
    yield "dtype", manifest.get("dtype"), graph.dtype
    yield "kv.dtype", kv.get("dtype"), graph.cache_dtype
    yield "dialect", manifest.get("dialect"), graph.dialect
    yield "padding", manifest.get("padding"), "right" if right else "left"
    yield "opset", manifest.get("opset"), opset
    yield "kv.shared_buffer", kv.get("shared_buffer"), right
    yield "kv.layers", kv.get("layers"), graph.layers
    yield "kv.heads", kv.get("heads"), graph.kv_heads
    yield "kv.head_dim", kv.get("head_dim"), graph.head_dim
    yield "model.layers", model.get("layers"), graph.layers
    yield "vocab_size", manifest.get("vocab_size"), graph.vocab_size
    said, counted = memory.get("weight_bytes"), count_weights(proto).nbytes
    close = isinstance(said, int) and abs(said - counted) <= _SMALL + counted // 100
    yield "memory.weight_bytes", said, said if close else counted
    yield "memory.kv_bytes_per_token", memory.get("kv_bytes_per_token"), graph.kv_bytes_per_token
    yield "graph.nodes", _object(manifest, "graph").get("nodes"), len(proto.graph.node)
    written = companion(reference, "generation_config.json")
    generation = {} if written is None else load_object(written)
    ends = {token for source in (generation, config) for token in _tokens(source.get("eos_token_id"))}
    yield "eos_token_ids", sorted(_tokens(manifest.get("eos_token_ids"))), sorted(ends)
    for key in ("bos_token_id", "pad_token_id"):
        given = (source.get(key) for source in (generation, config))
        yield key, manifest.get(key), next((token for token in given if isinstance(token, int)), None)


def length_claims(
    graph: ExportedGraph, manifest: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, int, int]]:
    """Lengths in positions: what limits the model, how many it has, how many the manifest promises (at least one)."""
    promised = _object(manifest, "limits").get("max_seq_len")
    promised = promised if isinstance(promised, int) and promised > 0 else 2**31
    for key in ("max_position_embeddings", "n_positions"):
        known = config.get(key)
        if isinstance(known, int):
            yield f"config.json's {key}", known, promised
    for tensor in graph.proto.graph.initializer:
        if tensor.name.startswith("/rotary") and tensor.name.endswith(_TABLES):
            yield f"the table {tensor.name}", int(tensor.dims[0]), promised


def genai_claims(genai: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[Claim]:
    """Facts of genai_config.json that the manifest states too."""
    model = _object(genai, "model")
    decoder, kv = _object(model, "decoder"), _object(manifest, "kv")
    yield "model.context_length", model.get("context_length"), _object(manifest, "limits").get("max_seq_len")
    yield "model.vocab_size", model.get("vocab_size"), manifest.get("vocab_size")
    ends = sorted(_tokens(manifest.get("eos_token_ids")))
    yield "model.eos_token_id", sorted(_tokens(model.get("eos_token_id"))), ends
    yield "model.decoder.num_hidden_layers", decoder.get("num_hidden_layers"), kv.get("layers")
    yield "model.decoder.num_key_value_heads", decoder.get("num_key_value_heads"), kv.get("heads")
    yield "model.decoder.head_size", decoder.get("head_size"), kv.get("head_dim")


def profile_claims(trt: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Runs that a TensorRT folder promises, and whether a profile of its manifest admits them."""
    promised = _object(manifest, "limits").get("max_seq_len")
    batch, prompt = trt.get("max_batch"), trt.get("max_input_len")
    if not (isinstance(promised, int) and isinstance(batch, int) and isinstance(prompt, int)):
        return
    runs = {
        f"{batch} prompts of {prompt} tokens": (batch, prompt, 0),
        f"a token after {promised - 1} positions": (1, 1, promised - 1),
    }
    for what, (rows, new, past) in runs.items():
        wanted = {"input_ids": (rows, new), "attention_mask": (rows, past + new)}
        yield what, any(_admits(profile, wanted, rows, past) for profile in trt.get("profiles") or ())


def _admits(profile: Any, wanted: Mapping[str, tuple[Any, ...]], rows: Any, past: Any) -> bool:
    inputs = _object(profile, "inputs") if isinstance(profile, dict) else {}
    for name, bounds in inputs.items():
        low, high = (bounds.get(key) if isinstance(bounds, dict) else None for key in ("min", "max"))
        if not isinstance(low, list) or not isinstance(high, list) or len(low) != len(high):
            return False
        shape = wanted.get(name, (rows, *low[1:2], past, *low[3:]) if len(low) == 4 else ())
        sizes = zip(low, shape, high, strict=False)
        if len(shape) != len(low) or not all(a <= size <= b for a, size, b in sizes):
            return False
    return bool(inputs)


def _object(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = source.get(key)
    return value if isinstance(value, Mapping) else {}


def _tokens(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
