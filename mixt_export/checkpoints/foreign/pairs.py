"""Two stored factors as one linear of the IR, for every format that stores a matrix as two."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixt_export.checkpoints.foreign.config import family_of, model_type
from mixt_export.checkpoints.foreign.features import CONV1D, Features, features_of
from mixt_export.checkpoints.store import TensorStore
from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef

_AGAIN = "download or write the model again"

#: What names of tensors say about a format, to find folders that hold two.
_SIGNS = {
    "ALinear/BLinear": re.compile(r"\.[AB]Linear\.(weight|bias)"),
    "u_proj/v_proj": re.compile(r".+\.u_proj\.(weight|bias)"),
    "u_proj and v_proj of SVD-LLM's own classes": re.compile(r".+_[uv]_proj\.(weight|bias)"),
    "BLAST": re.compile(r".+\.[BCD]"),
    "Basis Sharing": re.compile(r".+_basis\..+"),
    "TT-LLM": re.compile(r".+\.tt_cores\.\d+"),
    "LoRA": re.compile(r".+\.lora_[AB]\..+"),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """Modules of the two factors of a linear: ``down`` reads the input, ``up`` makes the output."""

    up: str
    down: str

    def turned(self) -> Pair:
        """The factors in the other order."""
        return Pair(self.down, self.up)


def find_pairs(store: TensorStore, up: str, down: str) -> dict[str, Pair]:
    """Linears with a submodule ``up`` or ``down`` that has a weight; whether both are there is checked later."""
    found: dict[str, Pair] = {}
    for name in store:
        for own in (up, down):
            linear = name.removesuffix(f".{own}.weight")
            if linear != name and linear:
                found[linear] = Pair(f"{linear}.{up}", f"{linear}.{down}")
    # A submodule may be called like a linear (SVD-LLM's v_proj): a pair needs the name that only factors have.
    return {linear: pair for linear, pair in found.items() if f"{pair.up}.weight" in store or up not in _ONLY_FACTORS}


_ONLY_FACTORS = frozenset({"u_proj"})


def refuse_mixture(where: Path, store: TensorStore, own: str) -> None:
    """Raise CheckpointError where a tensor's name is that of another format than ``own`` (a key of the signs)."""
    for name in store:
        for sign, pattern in _SIGNS.items():
            if sign != own and (pattern.search if sign.startswith("ALinear") else pattern.fullmatch)(name):
                raise CheckpointError(
                    f"{where}: holds {name!r}, a tensor of another format ({sign}) than its other factors ({own}); "
                    "a folder holds one format: remove what does not belong to this model."
                )


def two_factor_linears(
    where: Path,
    config: Mapping[str, Any],
    store: TensorStore,
    pairs: Mapping[str, Pair],
    ranks: Mapping[str, int] | None,
    method: str,
) -> dict[str, FactorizedLinear]:
    """The linears of ``pairs``, checked against ``ranks`` (linear -> rank, None where config.json has none).

    Raises CheckpointError for a factor that is missing, a rank or size that does not fit, a linear that is stored dense
    as well, and linears in only one of ``pairs`` and ``ranks``; UnsupportedError for a bias between the factors.
    """
    known = None if ranks is None else _named_alike(ranks, pairs)
    for linear, rank in (known or {}).items():
        if linear not in pairs:
            dense = " (it is stored dense)" if f"{linear}.weight" in store else ""
            raise CheckpointError(
                f"{where}: config.json gives {linear!r} the rank {rank}, but its factors are in no weight file{dense}; "
                f"{_AGAIN}."
            )
    found = {}
    for linear, pair in pairs.items():
        if known is not None and linear not in known:
            raise CheckpointError(
                f"{where}: the weight files hold factors of {linear!r}, which config.json does not list; {_AGAIN}."
            )
        asked = None if known is None else known[linear]
        found[linear] = two_factor(where, config, store, linear, pair, asked, method)
    return found


def two_factor(
    where: Path,
    config: Mapping[str, Any],
    store: TensorStore,
    linear: str,
    pair: Pair,
    rank: int | None,
    method: str,
) -> FactorizedLinear:
    """One linear; see two_factor_linears."""
    down, up = (_factor(where, store, linear, part) for part in (pair.down, pair.up))
    if f"{linear}.weight" in store:
        raise CheckpointError(
            f"{where}: {linear!r} is stored both as factors and dense ({linear}.weight); remove one of the two."
        )
    if f"{pair.down}.bias" in store:
        raise UnsupportedError(
            f"{where}: the first factor of {linear!r} has a bias ({pair.down}.bias), which no factorised linear has; "
            "it is not read."
        )
    conv1d = family_of(model_type(config)) in CONV1D and linear != "lm_head"
    cores = _oriented(where, linear, down, up, rank, features_of(config, linear), conv1d)
    bias = store.refs.get(f"{pair.up}.bias") or store.refs.get(f"{linear}.bias")
    sizes = {label: size for core in cores for label, size in core.modes()}
    branch = Branch((("i", sizes["i"]),), (("o", sizes["o"]),), cores)
    return FactorizedLinear(linear, sizes["i"], sizes["o"], (branch,), bias, method)


def fits(down: TensorRef, up: TensorRef, rank: int | None, features: Features | None) -> bool:
    """Whether the two are the factors of a linear in this order, as nn.Linear stores them."""
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
        return False
    return rank in (None, down.shape[0]) and features in (None, (down.shape[1], up.shape[0]))


def _factor(where: Path, store: TensorStore, linear: str, module: str) -> TensorRef:
    name = f"{module}.weight"
    if name not in store:
        raise CheckpointError(
            f"{where}: the linear {linear!r} lacks its factor {name!r}, which is in no weight file; {_AGAIN}."
        )
    return store[name].ref


#: Labels of (down, up) as nn.Linear stores a matrix, (out, in), and as Conv1D does, (in, out).
_LINEAR = (("r", "i"), ("o", "r"))
_CONV1D = (("i", "r"), ("r", "o"))


def _oriented(
    where: Path,
    linear: str,
    down: TensorRef,
    up: TensorRef,
    rank: int | None,
    features: Features | None,
    conv1d: bool,
) -> tuple[Core, Core]:
    """The two cores in the layout that fits rank and features; where both do, in that of the family's linears."""
    for labels in (_CONV1D, _LINEAR) if conv1d else (_LINEAR, _CONV1D):
        if len(down.shape) != 2 or len(up.shape) != 2:
            break
        sizes = [dict(zip(names, ref.shape, strict=True)) for names, ref in zip(labels, (down, up), strict=True)]
        found, expected = (sizes[0]["i"], sizes[1]["o"]), features
        if sizes[0]["r"] == sizes[1]["r"] and rank in (None, sizes[0]["r"]) and expected in (None, found):
            return Core(down, labels[0]), Core(up, labels[1])
    asked = " and ".join(
        text
        for text in (
            f"rank {rank}" if rank is not None else "",
            f"{features[0]} to {features[1]} features" if features is not None else "",
        )
        if text
    )
    raise CheckpointError(
        f"{where}: the factors of {linear!r} are {down.name!r} {down.shape} and {up.name!r} {up.shape}, which do not "
        f"fit {asked or 'each other'}{' of config.json' if asked else ''}; {_AGAIN}."
    )


def _named_alike(ranks: Mapping[str, int], pairs: Mapping[str, Pair]) -> dict[str, int]:
    """``ranks`` under the names of ``pairs``: they may be counted from the inner model, without ``model.``."""
    return {name if name in pairs or f"model.{name}" not in pairs else f"model.{name}": ranks[name] for name in ranks}
