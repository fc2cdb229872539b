"""Basis Sharing: one basis for a group of layers, y_l = coefficient_l(basis_group(x)).

Written by https://github.com/TUDa-HWAI/Basis_Sharing (models/llama.py, mistral.py, gpt2.py, model_factory.py, saved by
save_pretrained(safe_serialization=False)) and converted by LowRankArena (model_type basis_sharing_llama):
architectures Share<Family>ForCausalLM, per type of linear `<type>_groups` (lists of layers) and `num_basis_<type>`;
`<inner model>.<type>_basis.<layer>.weight` (basis, in), the same tensor for every layer of a group, again below each
layer's own module (`….self_attn.q_basis.weight`); the linear's weight is the coefficient (out, basis), its bias a bias.
The linears of a group name one tensor, which is stored and counted once. Coefficients are called `<linear>.coefficient`
here: `<linear>.weight` is a dense matrix everywhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.foreign import config as configs
from mixt_export.checkpoints.foreign.features import features_of
from mixt_export.checkpoints.foreign.pairs import refuse_mixture
from mixt_export.checkpoints.store import TensorStore
from mixt_export.checkpoints.weights import open_weights
from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef

NAME = "basis-sharing"
_AGAIN = "download or write the model again"


@dataclass(frozen=True, slots=True)
class _Names:
    """Where a family's model keeps its bases and its linears: type -> module of a layer that holds the linear."""

    inner: str
    layers: str
    linears: Mapping[str, tuple[str, str]]


_GATED = _Names(
    "model",
    "model.layers",
    {
        **{kind: ("self_attn", f"{kind}_proj") for kind in ("q", "k", "v", "o")},
        **{kind: ("mlp", f"{kind}_proj") for kind in ("gate", "up", "down")},
    },
)
_FAMILIES = {
    "llama": _GATED,
    "mistral": _GATED,
    "gpt2": _Names(
        "transformer",
        "transformer.h",
        {"attn": ("attn", "c_attn"), "o": ("attn", "c_proj"), "up": ("mlp", "c_fc"), "down": ("mlp", "c_proj")},
    ),
}


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None."""
    config = configs.peek(folder)
    key = next((key for key in config if key.startswith("num_basis_")), None)
    if key is not None:
        return f"{key} in {CONFIG_FILE}"
    found = configs.model_type(config)
    return f"model_type {found!r} in {CONFIG_FILE}" if found.startswith("basis_sharing_") else None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder; see open_checkpoint. UnsupportedError for a family whose modules are not known."""
    given = configs.own_config(folder, NAME)
    config = configs.normalised(given, NAME)
    kinds = [key.removeprefix("num_basis_") for key in given if key.startswith("num_basis_")]
    for kind in kinds:
        config.pop(f"num_basis_{kind}")
        config.pop(f"{kind}_groups", None)
    names = _FAMILIES.get(config["model_type"])
    if names is None:
        raise UnsupportedError(
            f"{folder}: shared bases of model_type {config['model_type']!r} are not read; those of "
            f"{', '.join(sorted(_FAMILIES))} are."
        )
    store = open_weights(folder)
    refuse_mixture(folder, store, "Basis Sharing")
    factors: dict[str, FactorizedLinear] = {}
    bases: set[str] = set()
    coefficients: dict[str, str] = {}
    for kind in kinds:
        if kind not in names.linears:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: num_basis_{kind} is no type of linear of {config['model_type']}; there are "
                f"{', '.join(names.linears)}."
            )
        for group in _groups(folder, given, kind):
            found = _bases(store, names, kind, group)
            bases.update(*found.values())
            for layer in group:
                linear = _linear(folder, given, store, names, kind, layer, found, group)
                factors[linear.name] = linear
                coefficients[f"{linear.name}.weight"] = f"{linear.name}.coefficient"
    used = {ref.name for linear in factors.values() for ref in linear.tensors()}
    left = next((name for name in store if "_basis." in name and name not in bases), None)
    if left is not None:
        raise CheckpointError(f"{folder}: holds {left!r}, which belongs to no group in {CONFIG_FILE}; {_AGAIN}.")
    kept = {}
    for name, stored in store.items():
        if name not in bases - used:
            called = coefficients.get(name, name)
            if called in kept:
                raise CheckpointError(f"{folder}: holds two tensors that are {called!r}; {_AGAIN}.")
            kept[called] = replace(stored, ref=replace(stored.ref, name=called))
    return Checkpoint(folder, NAME, reason, config, TensorStore(kept), factors)


def _groups(folder: Path, config: Mapping[str, Any], kind: str) -> list[list[int]]:
    groups = config.get(f"{kind}_groups")
    whole = isinstance(groups, list) and all(
        isinstance(group, list) and group and all(type(layer) is int and layer >= 0 for layer in group)
        for group in groups
    )
    if not whole:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {kind}_groups must list groups of layers; {_AGAIN}.")
    assert isinstance(groups, list)
    layers = [layer for group in groups for layer in group]
    (twice, times), *_ = Counter(layers).most_common(1) or [(0, 0)]
    if times > 1:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {kind}_groups names layer {twice} more than once; {_AGAIN}.")
    return groups


def _bases(store: TensorStore, names: _Names, kind: str, group: list[int]) -> dict[int, list[str]]:
    """Per layer of ``group`` the names under which its basis is stored; often all are one tensor."""
    module, _ = names.linears[kind]
    return {
        layer: [
            name
            for name in (
                f"{names.inner}.{kind}_basis.{layer}.weight",
                f"{names.layers}.{layer}.{module}.{kind}_basis.weight",
            )
            if name in store
        ]
        for layer in group
    }


def _linear(
    folder: Path,
    config: Mapping[str, Any],
    store: TensorStore,
    names: _Names,
    kind: str,
    layer: int,
    bases: Mapping[int, list[str]],
    group: list[int],
) -> FactorizedLinear:
    module, last = names.linears[kind]
    name = f"{names.layers}.{layer}.{module}.{last}"
    # A writer of safetensors keeps one name of a shared tensor; every layer of the group then has that one.
    every = [*bases[layer], *(other for member in group for other in bases[member])]
    if not every or f"{name}.weight" not in store:
        lacking = f"{name}.weight" if every else f"{names.inner}.{kind}_basis.{layer}.weight"
        raise CheckpointError(f"{folder}: the linear {name!r} lacks {lacking}, which is in no weight file; {_AGAIN}.")
    basis = _one_name(store, every)
    coefficient = store[f"{name}.weight"].ref
    count = config.get(f"num_basis_{kind}")
    fits = len(basis.shape) == 2 and len(coefficient.shape) == 2 and coefficient.shape[1] == basis.shape[0] == count
    features = features_of(config, name)
    if not fits or features not in (None, (basis.shape[1], coefficient.shape[0])):
        raise CheckpointError(
            f"{folder}: {name!r} has a basis of shape {basis.shape} and coefficients of shape {coefficient.shape}, "
            f"which do not fit num_basis_{kind} {count!r}"
            f"{f' and {features[0]} to {features[1]} features' if features else ''} of {CONFIG_FILE}; {_AGAIN}."
        )
    coefficient = replace(coefficient, name=f"{name}.coefficient")
    cores = (Core(basis, ("r", "i")), Core(coefficient, ("o", "r")))
    branch = Branch((("i", basis.shape[1]),), (("o", coefficient.shape[0]),), cores)
    bias = store.refs.get(f"{name}.bias")
    return FactorizedLinear(name, basis.shape[1], coefficient.shape[0], (branch,), bias, NAME)


def _one_name(store: TensorStore, names: list[str]) -> TensorRef:
    """Of the names of one tensor always the same, so that a basis is stored once; else the first, the layer's own."""
    first = store[names[0]]
    if first.made is not None:  # it is gathered from all over its storage: no offset says what it is
        return first.ref
    place = (first.path, first.offset)
    return store[min(name for name in names if (store[name].path, store[name].offset) == place)].ref
