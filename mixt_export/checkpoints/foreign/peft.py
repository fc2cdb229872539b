"""PEFT LoRA adapters: W + s·B·A over a base model, which may be dense or factorised.

Written by https://github.com/huggingface/peft (src/peft/utils/save_and_load.py, tuners/lora): adapter_config.json and
adapter_model.safetensors (or .bin) with `base_model.model.<linear>.lora_A.weight` (rank, in) and `.lora_B.weight`
(out, rank); s = alpha / r, with use_rslora alpha / √r, alpha and r by pattern where there are patterns. Over a
factorised linear the adapter is one more branch. A dense weight takes it in by default, as PEFT's merge_and_unload
does, when it is read; kept, the linear is two branches, its matrix and the adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.checkpoints import paths, strictjson
from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.foreign.features import CONV1D
from mixt_export.checkpoints.foreign.over_base import open_base, over_base
from mixt_export.checkpoints.store import StoredTensor, TensorStore, read_tensors
from mixt_export.checkpoints.weights import pickled_tensors
from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef

NAME = "peft-lora"
CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
#: No float64 holds more.
_LARGEST_ALPHA = 1e308
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_AGAIN = "download or save the adapter again"
_PLAIN = re.compile(r"[\w.-]+")

#: Settings that change what an adapter computes in ways that are not read.
_UNREAD = (
    "use_dora", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "target_parameters",
    "trainable_token_indices", "arrow_config", "lora_bias", "megatron_config",
)  # fmt: skip
#: Initialisations that leave the base model's weights as they are; others (PiSSA, OLoRA, …) change them.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class _Adapter:
    """The adapter of one linear: y += scale · up(down(x))."""

    down: StoredTensor
    up: StoredTensor
    scale: float


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None. Looks at file names only."""
    path = folder / CONFIG
    return CONFIG if path.exists() or path.is_symlink() else None


def open(folder: Path, reason: str, *, keep: bool = False) -> Checkpoint:
    """Open the adapter over its base model; see open_checkpoint and over_base.open_base.

    ``keep``: adapters of dense linears stay branches instead of being taken in. Raises UnsupportedError for adapters
    that are more than LoRA, CheckpointError for ones that do not fit the base model.
    """
    path = paths.required_file(folder, CONFIG, _AGAIN)
    config = strictjson.load_object(path)
    _check(path, config)
    named = config.get("base_model_name_or_path")
    base = open_base(folder, named if isinstance(named, str) else None, "a LoRA adapter")
    stored = _tensors(folder)
    adapters, whole = _adapters(folder, path, config, stored)
    tensors = {name: _whole(folder, base, name, tensor) for name, tensor in whole.items()}
    _refuse_tied(folder, base, tensors)
    factors: dict[str, FactorizedLinear] = {}
    for linear, adapter in adapters.items():
        known = base.factors.get(linear)
        if known is None and not keep:
            tensors[f"{linear}.weight"] = _merged(folder, base, linear, adapter, tensors.get(f"{linear}.weight"))
            continue
        stem = _free(base, f"{linear}.lora")
        cores = (_core(adapter.down, f"{stem}_A", ("r", "i")), _core(adapter.up, f"{stem}_B", ("o", "r")))
        for core, part in zip(cores, (adapter.down, adapter.up), strict=True):
            tensors[core.tensor.name] = replace(part, ref=core.tensor)
        if known is None:
            known = _matrix(folder, base, linear, adapter)
            name, matrix = f"{linear}.weight", known.branches[0].cores[0].tensor
            tensors[matrix.name] = replace(tensors.pop(name, base.store[name]), ref=matrix)
        factors[linear] = _with_branch(folder, base, known, cores, adapter.scale)
    count = f"{len(adapters)} linears, {'kept as branches' if keep else 'merged into dense weights'}"
    return over_base(folder, NAME, reason, base, tensors, factors, {"adapter": count})


def _check(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for an adapter that computes something else than W + s·B·A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{path}: is an adapter of peft_type {kind!r}; LORA alone is read: merge it with PEFT.")
    for key in _UNREAD:
        if config.get(key):
            raise UnsupportedError(
                f"{path}: has {key}, which is more than a LoRA adapter and is not read; merge it with PEFT "
                "(merge_and_unload) and use the merged model."
            )
    start = config.get("init_lora_weights", True)
    if not any(start is known or start == known for known in _INITIALISATIONS):
        raise UnsupportedError(
            f"{path}: was initialised by {start!r}, which changes the base model's weights too; save it converted to "
            "plain LoRA (path_initial_model_for_weight_conversion), or merge it with PEFT."
        )


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    for name, read in zip(_WEIGHTS, (read_tensors, pickled_tensors), strict=True):
        path = paths.own_file(folder, name)
        if path is not None:
            return read(path)
    raise CheckpointError(f"{folder}: has no {_WEIGHTS[0]}; {_AGAIN}.")


def _adapters(
    folder: Path, path: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, _Adapter], dict[str, StoredTensor]]:
    """Adapters by linear, and tensors that replace the base model's (modules_to_save, biases), by name."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        inner = name.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(inner)
        if match is not None:
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_" in inner or inner == name:
            raise UnsupportedError(
                f"{folder}: the adapter holds {name!r}, which is no factor of a linear and is not read; merge it with "
                "PEFT (merge_and_unload) and use the merged model."
            )
        else:
            called = inner.replace(".modules_to_save", "").replace(".base_layer.", ".")
            if whole.setdefault(called, tensor) is not tensor:
                raise CheckpointError(f"{folder}: the adapter replaces {called!r} twice; {_AGAIN}.")
    adapters = {}
    for linear, pair in factors.items():
        if set(pair) != {"A", "B"}:
            lacking = f"lora_{'B' if 'A' in pair else 'A'}"
            raise CheckpointError(f"{folder}: the adapter of {linear!r} lacks {lacking}.weight; {_AGAIN}.")
        down, up = pair["A"], pair["B"]
        if len(down.ref.shape) != 2 or len(up.ref.shape) != 2 or down.ref.shape[0] != up.ref.shape[1]:
            raise CheckpointError(
                f"{folder}: the adapter of {linear!r} has lora_A {down.ref.shape} and lora_B {up.ref.shape}, which do "
                f"not fit (rank, in) and (out, rank); {_AGAIN}."
            )
        adapters[linear] = _Adapter(down, up, _scale(path, config, linear, down.ref.shape[0]))
    if not adapters:
        raise CheckpointError(f"{folder}: the adapter holds no lora_A and lora_B; {_AGAIN}.")
    return adapters, whole


def _scale(path: Path, config: Mapping[str, Any], linear: str, rank: int) -> float:
    """alpha / r or alpha / √r. Raises CheckpointError where r is not the rank of the factors."""
    r, alpha = (
        _by_pattern(path, pattern, config.get(pattern), linear, config.get(key, 8))
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    if r != rank:
        raise CheckpointError(
            f"{path}: gives the adapter of {linear!r} the rank {r!r}, its factors have {rank}; {_AGAIN}."
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST_ALPHA:
        raise CheckpointError(f"{path}: lora_alpha of {linear!r} is {alpha!r}, which is no number; {_AGAIN}.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(path: Path, name: str, patterns: Any, linear: str, default: Any) -> Any:
    """The value of the first pattern that is the end of the linear's path (peft.utils.get_pattern_key), or the default.

    A pattern is a regular expression in PEFT, and those of strangers are not run: UnsupportedError for one that is more
    than a path, since not to match it would be to guess.
    """
    if isinstance(patterns, Mapping):
        for key, value in patterns.items():
            plain = str(key).removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not _PLAIN.fullmatch(plain):
                raise UnsupportedError(
                    f"{path}: {name} has the regular expression {key!r}, which is not run; merge the adapter with PEFT "
                    "(merge_and_unload) and use the merged model."
                )
            if linear == plain or (linear.endswith(f".{plain}") and not str(key).startswith("^")):
                return value
    return default


def _whole(folder: Path, base: Checkpoint, name: str, stored: StoredTensor) -> StoredTensor:
    """A tensor of the adapter's in place of the base model's. CheckpointError where that has none of its shape."""
    before = base.store.refs.get(name)
    if before is None or before.shape != stored.ref.shape:
        found = "no such tensor" if before is None else f"one of shape {before.shape}"
        raise CheckpointError(
            f"{folder}: the adapter replaces {name!r} of shape {stored.ref.shape} (modules_to_save), the base model "
            f"{base.path} has {found}; merge it with PEFT and use the merged model."
        )
    return replace(stored, ref=replace(stored.ref, name=name))


def _refuse_tied(folder: Path, base: Checkpoint, tensors: Mapping[str, StoredTensor]) -> None:
    replaced = next(
        (name for name in tensors if name.endswith("embed_tokens.weight") or name == "lm_head.weight"), None
    )
    if replaced is not None and base.config.get("tie_word_embeddings"):
        raise UnsupportedError(
            f"{folder}: the adapter replaces {replaced!r}, which config.json ties to the other end of the model; merge "
            "it with PEFT and use the merged model."
        )


def _dense(folder: Path, base: Checkpoint, linear: str, adapter: _Adapter) -> tuple[TensorRef, bool]:
    """The base's weight of ``linear`` and whether it is stored (in, out). CheckpointError where it does not fit."""
    ref = base.store.refs.get(f"{linear}.weight")
    turned = base.config.get("model_type") in CONV1D and linear != "lm_head"
    shape = (adapter.up.ref.shape[0], adapter.down.ref.shape[1])
    if ref is None or ref.shape != (shape[::-1] if turned else shape):
        found = "is no linear" if ref is None else f"is {ref.shape}"
        raise CheckpointError(
            f"{folder}: the adapter of {linear!r} is {shape[1]} to {shape[0]} features, but this {found} in the base "
            f"model {base.path}; give the model that the adapter was trained on with --base."
        )
    return ref, turned


def _merged(
    folder: Path, base: Checkpoint, linear: str, adapter: _Adapter, replaced: StoredTensor | None
) -> StoredTensor:
    ref, turned = _dense(folder, base, linear, adapter)
    weight = TensorStore({ref.name: replaced or base.store[ref.name], "down": adapter.down, "up": adapter.up})
    return StoredTensor(ref, folder / CONFIG, 0, ref.nbytes, _sum(weight, ref.name, adapter.scale, turned))


def _sum(store: TensorStore, name: str, scale: float, turned: bool) -> Callable[[], np.ndarray[Any, Any]]:
    def make() -> np.ndarray[Any, Any]:
        change = scale * (store.read("up", "float64") @ store.read("down", "float64"))
        total: np.ndarray[Any, Any] = store.read(name, "float64") + (change.T if turned else change)
        return total

    return make


def _free(base: Checkpoint, stem: str) -> str:
    """``stem``, with a number where the base model has such an adapter already."""
    number = 1
    while f"{stem}{number if number > 1 else ''}_A" in base.store:
        number += 1
    return f"{stem}{number if number > 1 else ''}"


def _core(stored: StoredTensor, name: str, labels: tuple[str, str]) -> Core:
    return Core(replace(stored.ref, name=name), labels)


def _matrix(folder: Path, base: Checkpoint, linear: str, adapter: _Adapter) -> FactorizedLinear:
    """The dense weight of ``linear`` as a branch of one core, called ``<linear>.matrix``."""
    ref, turned = _dense(folder, base, linear, adapter)
    labels = ("i", "o") if turned else ("o", "i")
    core = Core(replace(ref, name=f"{linear}.matrix"), labels)
    sizes = dict(core.modes())
    branch = Branch((("i", sizes["i"]),), (("o", sizes["o"]),), (core,))
    return FactorizedLinear(linear, sizes["i"], sizes["o"], (branch,), base.store.refs.get(f"{linear}.bias"), "dense")


def _with_branch(
    folder: Path, base: Checkpoint, known: FactorizedLinear, cores: tuple[Core, Core], scale: float
) -> FactorizedLinear:
    """``known`` with the adapter as one more branch. CheckpointError where the features differ."""
    down, up = (core.tensor.shape for core in cores)
    if (down[1], up[0]) != (known.in_features, known.out_features):
        raise CheckpointError(
            f"{folder}: the adapter of {known.name!r} is {down[1]} to {up[0]} features, the base model's linear "
            f"{known.in_features} to {known.out_features} ({base.path}); give the model that it was trained on with "
            "--base."
        )
    branch = Branch((("i", down[1]),), (("o", up[0]),), cores, scale)
    return replace(known, branches=(*known.branches, branch), method=f"{known.method}+lora")
