"""mixt_manifest.json: what an exported folder is, as data. Specified in docs/format.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixt_export import __version__
from mixt_export.checkpoints import Checkpoint
from mixt_export.checkpoints.strictjson import load_object
from mixt_export.families import Decoder, decoder_of
from mixt_export.lower import LoweredModel
from mixt_export.lower.weights import itemsize
from mixt_export.plan import FormPlan
from mixt_export.plan.report import plan_entry
from mixt_export.targets.registry import Target

SCHEMA = 1
FILE = "mixt_manifest.json"


def build_manifest(
    target: Target,
    checkpoint: Checkpoint,
    decoder: Decoder,
    lowered: LoweredModel,
    *,
    max_seq_len: int,
    weight_bytes: int,
    forms: FormPlan,
    files: Mapping[str, Mapping[str, Any]],
    trt: Mapping[str, Any] | None = None,
    cache_dtype: str = "",
) -> dict[str, Any]:
    """The manifest of a folder about to be written; ``files`` maps file name to its bytes and SHA-256.

    ``trt``: what only a TensorRT folder says, see docs/tensorrt.md. ``cache_dtype``: of keys and values, where it
    is not the graph's.
    """
    dtype = lowered.weights.dtype
    token_ids = special_token_ids(checkpoint)
    layers = len(decoder_of(checkpoint.config).blocks)
    return {
        "schema": SCHEMA,
        "tool": {"name": "mixt-export", "version": __version__},
        "target": target.name,
        "dialect": target.dialect.name,
        "opset": target.dialect.opset,
        "dtype": dtype,
        "padding": target.dialect.padding,
        "model": {
            "model_type": decoder.model_type,
            "layers": len(decoder.blocks),
            "layers_in_source": layers,
            "hidden_size": decoder.hidden_size,
            "heads": decoder.heads,
        },
        "kv": {
            "layers": len(decoder.blocks),
            "heads": decoder.kv_heads,
            "head_dim": decoder.head_dim,
            "dtype": cache_dtype or dtype,
            "shared_buffer": target.dialect.shared_buffer,
        },
        "limits": {"max_seq_len": max_seq_len},
        "vocab_size": decoder.vocab_size,
        **token_ids,
        "memory": {
            "weight_bytes": weight_bytes,
            "kv_bytes_per_token": decoder.kv_bytes_per_token(itemsize(cache_dtype or dtype)),
        },
        "graph": {"nodes": len(lowered.model.graph)},
        "source": {"format": checkpoint.format, "info": dict(checkpoint.info)},
        "linears": {linear.name: linear_entry(checkpoint, lowered, linear.name) for linear in decoder.linears},
        **({"plan": plan_entry(forms)} if forms.choices else {}),
        "files": dict(files),
        **({} if trt is None else {"trt": dict(trt)}),
    }


def linear_entry(checkpoint: Checkpoint, lowered: LoweredModel, name: str) -> dict[str, Any]:
    """What the manifest says of one linear: its form, method and parameters."""
    factors = checkpoint.factors.get(name)
    shape = checkpoint.store[f"{name}.weight"].ref.shape if factors is None else None
    dense = shape[0] * shape[1] if shape else factors.in_features * factors.out_features if factors else 0
    return {
        "form": lowered.forms[name],
        "method": "dense" if factors is None else factors.method,
        "params": dense if factors is None else factors.params,
        "dense_params": dense,
    }


def special_token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """``bos_token_id``, ``pad_token_id`` (int or null), ``eos_token_ids``; generation_config.json before config.json.

    Several end tokens in either file are all kept: a chat model often lists more in the one than in the other.
    """
    generation = checkpoint.companion("generation_config.json")
    sources = [{} if generation is None else load_object(generation), dict(checkpoint.config)]
    ends: list[int] = []
    for source in sources:
        given = source.get("eos_token_id")
        ends += [token for token in (given if isinstance(given, list) else [given]) if isinstance(token, int)]

    def first(key: str) -> int | None:
        return next((source[key] for source in sources if isinstance(source.get(key), int)), None)

    return {
        "bos_token_id": first("bos_token_id"),
        "pad_token_id": first("pad_token_id"),
        "eos_token_ids": list(dict.fromkeys(ends)),
    }
