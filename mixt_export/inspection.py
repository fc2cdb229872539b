"""What a model folder or an exported folder holds, from its headers and descriptions alone: no weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

from mixt_export.checkpoints import Checkpoint, open_checkpoint, paths, strictjson
from mixt_export.checkpoints.layout import layer_of, place
from mixt_export.errors import MixtError, UnsupportedError
from mixt_export.families import decoder_of
from mixt_export.families.encoders import is_encoder
from mixt_export.network import FactorizedLinear, TensorRef

MANIFEST_FILE = "mixt_manifest.json"

#: Parts of a tensor's name that say it is an embedding or the head (transformers' names).
_EMBEDDINGS = frozenset(
    {"embed_tokens", "embed_positions", "wte", "wpe", "lm_head", "embed_out"}
    | {"word_embeddings", "position_embeddings", "token_type_embeddings"}
)
_KV_DTYPES = {"float32": 4, "float16": 2}

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")

Report = dict[str, Any]


def inspect(path: Path) -> Report:
    """Report on the folder ``path`` as data for JSON; ``kind`` is ``model`` or ``export``.

    Raises CheckpointError, NetworkError or UnsupportedError as open_checkpoint does.
    """
    if paths.own_file(path, MANIFEST_FILE) is not None:
        return inspect_export(path)
    return inspect_model(open_checkpoint(path))


def inspect_model(checkpoint: Checkpoint) -> Report:
    """Report on a model folder: format, parameters, bytes, what each linear is, KV bytes per token."""
    store, config = checkpoint.store, checkpoint.config
    linears = _linears(checkpoint)
    embeddings = {name for name in store if _EMBEDDINGS & set(name.split("."))}
    in_linears = {ref.name for linear in checkpoint.factors.values() for ref in _parameters(linear)}
    in_linears |= {f"{entry['name']}.weight" for entry in linears if entry["name"] not in checkpoint.factors}
    sizes = {name: stored.ref.size for name, stored in store.items()}
    total, in_embeddings = sum(sizes.values()), sum(sizes[name] for name in embeddings - in_linears)
    of_linears = sum(sizes[name] for name in in_linears)
    dtypes: dict[str, int] = {}
    for stored in store.values():
        dtypes[stored.ref.dtype] = dtypes.get(stored.ref.dtype, 0) + stored.nbytes
    return {
        "kind": "model",
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "reason": checkpoint.reason,
        "model_type": config["model_type"],
        "architectures": config.get("architectures"),
        "tied_embeddings": not (is_encoder(config) or "lm_head.weight" in store or "lm_head" in checkpoint.factors),
        "bytes": store.nbytes,
        "bytes_by_dtype": dtypes,
        "files": {_file_name(checkpoint, file): file.stat().st_size for file in store.files},
        "params": {
            "total": total,
            "embeddings": in_embeddings,
            "linears": of_linears,
            "other": total - in_embeddings - of_linears,
            "dense_linears": sum(entry["dense_params"] for entry in linears),
        },
        "types": _by_type(checkpoint, linears),
        "linears": _experts_together(checkpoint, linears),
        "plan": _plan(checkpoint),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "info": dict(checkpoint.info),
    }


def _file_name(checkpoint: Checkpoint, file: Path) -> str:
    """The name of a weight file in its folder; the whole path where it is another folder's."""
    return file.relative_to(checkpoint.path).as_posix() if file.is_relative_to(checkpoint.path) else str(file)


def inspect_export(path: Path) -> Report:
    """Report on an exported folder: its manifest, the size of every file, and the work of its nodes per token."""
    manifest = paths.required_file(path, MANIFEST_FILE, "export the model again")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return {
        "kind": "export",
        "path": str(path),
        "manifest": strictjson.load_object(manifest),
        "work": _work(path),
        "files": {file.relative_to(path).as_posix(): file.stat().st_size for file in files},
    }


def kv_bytes_per_token(config: Mapping[str, Any]) -> dict[str, int] | None:
    """Bytes of keys and values that one token adds to the cache, by dtype of the cache, or None when unknown.

    layers × 2 × KV heads × head size × bytes of an element; nothing for an encoder, which has no cache.
    """
    if is_encoder(config):
        return {}
    try:
        return {dtype: decoder_of(config).kv_bytes_per_token(size) for dtype, size in _KV_DTYPES.items()}
    except MixtError:
        pass
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    hidden, kv_heads = config.get("hidden_size"), config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim")
    if head_dim is None and _is_count(hidden) and _is_count(heads):
        head_dim = hidden // heads
    if not (_is_count(layers) and _is_count(kv_heads) and _is_count(head_dim)):
        return None
    return {dtype: layers * 2 * kv_heads * head_dim * size for dtype, size in _KV_DTYPES.items()}


def ranks(linear: FactorizedLinear) -> list[list[int]]:
    """Sizes of the bonds (labels of cores alone) of each branch: ``[[r]]`` for low rank."""
    found = []
    for branch in linear.branches:
        outer = {label for label, _ in chain(branch.in_modes, branch.out_modes)}
        found.append([size for label, size in branch.sizes().items() if label not in outer])
    return found


def _plan(checkpoint: Checkpoint) -> Report | None:
    """How an export with all defaults would execute the factorised linears; None where there are none."""
    from mixt_export.plan import choose_forms
    from mixt_export.plan.report import plan_entry

    factors = sorted(checkpoint.factors.values(), key=lambda linear: place(linear.name))
    return plan_entry(choose_forms(factors)) if factors else None


def _work(path: Path) -> list[Report] | str | None:
    """Nodes of the graph with their multiply-adds, or why they are unknown; None where there is no graph."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from mixt_export.verification.work import graph_work

    graph = paths.own_file(path, "model.onnx")
    if graph is None:
        return None
    try:
        found = graph_work(onnx.load(graph, load_external_data=False))
    except (DecodeError, UnsupportedError) as error:
        return str(error) or "the file is no ONNX model"
    return [asdict(node) for node in found if layer_of(node.name.strip("/").replace("/", ".")) is not None]


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _parameters(linear: FactorizedLinear) -> tuple[TensorRef, ...]:
    """Tensors that stand for the weight of ``linear``: cores and sparse values, not the bias, not sparse indices."""
    sparse = () if linear.sparse is None else (linear.sparse.values,)
    return (*linear.core_tensors(), *sparse)


def _linears(checkpoint: Checkpoint) -> list[Report]:
    """Every linear of the layers, dense or factorised, layer by layer in order of execution."""
    found = []
    for name, linear in checkpoint.factors.items():
        params = sum(ref.size for ref in _parameters(linear))
        shape = (linear.out_features, linear.in_features)
        found.append(_entry(name, shape, params, factorised=True, method=linear.method, bonds=ranks(linear)))
    in_factors = {ref.name for linear in checkpoint.factors.values() for ref in linear.tensors()}
    for tensor, ref in checkpoint.store.refs.items():
        name = tensor.removesuffix(".weight")
        if name != tensor and tensor not in in_factors and len(ref.shape) == 2 and layer_of(tensor) is not None:
            shape = (ref.shape[0], ref.shape[1])
            found.append(_entry(name, shape, ref.size, factorised=False, method="dense", bonds=[]))
    return sorted(found, key=lambda entry: place(entry["name"]))


def _entry(
    name: str, shape: tuple[int, int], params: int, *, factorised: bool, method: str, bonds: list[list[int]]
) -> Report:
    dense = shape[0] * shape[1]
    return {
        "name": name,
        "layer": layer_of(name),
        "type": _type_of(name),
        "shape": list(shape),
        "factorised": factorised,
        "method": method,
        "ranks": bonds,
        "params": params,
        "dense_params": dense,
        "share": params / dense if dense else 1.0,
    }


def _type_of(name: str) -> str:
    """Last part of a linear's name; with ``experts.`` before it where each expert has its own."""
    return ("experts." if _EXPERT.fullmatch(name) else "") + name.rpartition(".")[2]


def experts_folded(described: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of linears by name, with one entry for those of a layer's experts of one type.

    It holds what is the same for all of them, and how many they are as ``experts``.
    """
    result: dict[str, Any] = {}
    for name, facts in described.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            result[name] = facts
            continue
        together = f"{match[1]}.*.{match[3]}"
        before = result.get(together)
        kept = facts if before is None else {key: value for key, value in facts.items() if before.get(key) == value}
        result[together] = {**kept, "experts": 1 if before is None else before["experts"] + 1}
    return result


def _experts_together(checkpoint: Checkpoint, linears: Iterable[Report]) -> list[Report]:
    """``linears`` with those of a layer's experts as one entry per type, called ``….experts.*.gate_proj``.

    ``shape`` is then (experts, out, in), ``params`` counts a shared tensor once; ``method`` and ``ranks`` are those of
    the experts if all agree, else ``mixed`` and none; ``factorised``: whether any is.
    """
    found: dict[str, list[Report]] = {}
    for entry in linears:
        match = _EXPERT.fullmatch(entry["name"])
        found.setdefault(entry["name"] if match is None else f"{match[1]}.*.{match[3]}", []).append(entry)
    return [_together(checkpoint, name, entries) if "*" in name else entries[0] for name, entries in found.items()]


def _together(checkpoint: Checkpoint, name: str, entries: list[Report]) -> Report:
    first = entries[0]
    alike = all(entry["method"] == first["method"] for entry in entries)
    same = all(entry["ranks"] == first["ranks"] for entry in entries)
    tensors: dict[str, int] = {}
    for entry in entries:
        linear = checkpoint.factors.get(entry["name"])
        refs = (checkpoint.store[f"{entry['name']}.weight"].ref,) if linear is None else _parameters(linear)
        tensors.update((ref.name, ref.size) for ref in refs)
    params, dense = sum(tensors.values()), sum(entry["dense_params"] for entry in entries)
    return {
        **first,
        "name": name,
        "shape": [len(entries), *first["shape"]],
        "factorised": any(entry["factorised"] for entry in entries),
        "method": first["method"] if alike else "mixed",
        "ranks": first["ranks"] if alike and same else [],
        "params": params,
        "dense_params": dense,
        "share": params / dense if dense else 1.0,
    }


def _by_type(checkpoint: Checkpoint, linears: Iterable[Report]) -> dict[str, Report]:
    """Count and parameters per type of linear (q_proj, …); a tensor shared within a type counts once."""
    result: dict[str, Report] = {}
    counted: set[tuple[str, str]] = set()
    for entry in linears:
        kind = result.setdefault(entry["type"], {"count": 0, "factorised": 0, "params": 0, "dense_params": 0})
        linear = checkpoint.factors.get(entry["name"])
        kind["count"] += 1
        kind["factorised"] += linear is not None
        kind["dense_params"] += entry["dense_params"]
        refs = (checkpoint.store[f"{entry['name']}.weight"].ref,) if linear is None else _parameters(linear)
        for ref in refs:
            if (entry["type"], ref.name) not in counted:
                counted.add((entry["type"], ref.name))
                kind["params"] += ref.size
    return result
