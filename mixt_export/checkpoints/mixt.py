"""Our factorised format: a Hugging Face folder whose linears are described by mixt_factors.json (docs/format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixt_export import network
from mixt_export.checkpoints import huggingface, paths, strictjson
from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.experts import unstacked
from mixt_export.checkpoints.packed import Packed, unpacked
from mixt_export.checkpoints.store import TensorStore, open_store
from mixt_export.errors import CheckpointError, NetworkError, UnsupportedError

NAME = "mixt"
FACTORS_FILE = "mixt_factors.json"
FORMAT = "mixt-factors"
#: The newest version read; a folder is written as the oldest that can say what is in it.
VERSION = 2

#: Keys by version: 2 adds tensors that are stored in parts.
_KEYS = {1: {"format", "version", "linears", "info"}, 2: {"format", "version", "linears", "info", "packed"}}
_AGAIN = "write the folder again with mixt compress"


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in our factorised format, or None."""
    path = folder / FACTORS_FILE
    return f"{FACTORS_FILE} beside {CONFIG_FILE}" if path.exists() or path.is_symlink() else None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open a factorised folder and check each linear against the tensors present; see open_checkpoint."""
    path = paths.required_file(folder, FACTORS_FILE, _AGAIN)
    described = read_factors(path)
    config = huggingface.read_config(folder)
    store = unstacked(unpacked(open_store(folder), described.get("packed", {}), path), config)
    factors = {name: _linear(path, name, value, store) for name, value in described["linears"].items()}
    check_against_store(factors, store, str(path))
    return Checkpoint(folder, NAME, reason, config, store, factors, described["info"])


def read_factors(path: Path) -> dict[str, Any]:
    """The content of mixt_factors.json, its envelope checked: format, version, keys."""
    described = strictjson.load_object(path)
    if described.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format must be {FORMAT!r}, not {described.get('format')!r}; {_AGAIN}.")
    version = described.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: version must be a whole number from 1, not {version!r}; {_AGAIN}.")
    if version > VERSION:
        raise UnsupportedError(
            f"{path}: is version {version} of the format, this program reads up to version {VERSION}; "
            "update mixt-export."
        )
    keys = _KEYS[version]
    unknown, missing = sorted(set(described) - keys), sorted(keys - set(described))
    if unknown or missing:
        found = f"has the unknown key {unknown[0]!r}" if unknown else f"lacks the key {missing[0]!r}"
        raise CheckpointError(f"{path}: {found}; version {version} has exactly {', '.join(sorted(keys))}: {_AGAIN}.")
    for key in sorted(keys - {"format", "version"}):
        if not isinstance(described[key], dict):
            raise CheckpointError(f"{path}: {key} must be a JSON object; {_AGAIN}.")
    return described


def describe_factors(
    factors: Mapping[str, network.FactorizedLinear], info: Mapping[str, Any], packed: Mapping[str, Packed]
) -> dict[str, Any]:
    """What mixt_factors.json says: the inverse of read_factors."""
    linears = {name: network.to_json(linear) for name, linear in factors.items()}
    if not packed:
        return {"format": FORMAT, "version": 1, "linears": linears, "info": dict(info)}
    parts = {name: tensor.to_json() for name, tensor in packed.items()}
    return {"format": FORMAT, "version": 2, "linears": linears, "packed": parts, "info": dict(info)}


def check_against_store(factors: Mapping[str, network.FactorizedLinear], store: TensorStore, what: str) -> None:
    """Raise unless each tensor of ``factors`` is in ``store`` with its shape and dtype, and no dense weight beside it.

    ``what`` begins the message. CheckpointError: a tensor is absent or doubled; NetworkError: wrong shape or dtype.
    """
    for name, linear in factors.items():
        if f"{name}.weight" in store:
            raise CheckpointError(
                f"{what}: the linear {name!r} is factorised, but its dense weight {name}.weight is also in "
                f"{store[f'{name}.weight'].path.name}; {_AGAIN}."
            )
        for ref in linear.tensors():
            if ref.name not in store:
                raise CheckpointError(
                    f"{what}: the linear {name!r} needs the tensor {ref.name!r}, which is in no weight file; {_AGAIN}."
                )
            found = store[ref.name].ref
            if found != ref:
                raise NetworkError(
                    f"{what}: the linear {name!r} expects the tensor {ref.name!r} as {ref.dtype} {ref.shape}, but "
                    f"{store[ref.name].path.name} holds {found.dtype} {found.shape}; {_AGAIN}."
                )


def _linear(path: Path, name: str, value: Any, store: TensorStore) -> network.FactorizedLinear:
    try:
        return network.from_json(name, value, store.refs)
    except NetworkError as error:
        raise NetworkError(f"{path}: {error}") from None
