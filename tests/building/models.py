"""One-block models whose linears are replaced by every structure the IR knows, for builds that take seconds."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.network import FactorizedLinear, build
from tests.tiny import LINEARS, write_tiny

#: Sizes of the tiny models' features as three sites.
_SITES = {32: (4, 2, 4), 48: (4, 3, 4), 64: (4, 4, 4), 104: (2, 4, 13)}
Make = Callable[[str, int, int], FactorizedLinear | None]


def _chain(name: str, inside: int, outside: int) -> FactorizedLinear:
    return build.tensor_train(name, _SITES[inside], _SITES[outside], (5, 3))


def _tucker_heads(name: str, inside: int, outside: int) -> FactorizedLinear | None:
    stem, _, last = name.rpartition(".")
    if last not in ("q_proj", "o_proj"):  # the four query heads share two heads of keys and values
        return None
    return build.tucker_heads(name, last[0], 48, 4, 16, (20, 9, 3), shared=f"{stem}.tucker")


#: structure -> the network for a linear (name, in, out); None: it stays dense
STRUCTURES: dict[str, Make] = {
    "dense": lambda *_: None,
    "low_rank": lambda name, inside, outside: build.low_rank(name, inside, outside, 6),
    "tensor_train": _chain,
    "tucker_heads": _tucker_heads,
    "mixt": lambda name, inside, outside: build.mixt(name, inside, outside, 3),
}


def write_structure(folder: Path, structure: str, *, layers: int = 1) -> Path:
    """Write a model of ``layers`` blocks with random cores of ``structure`` below ``folder``; returns its folder."""
    base = write_tiny(folder / "base", num_hidden_layers=layers)
    make = STRUCTURES[structure]
    source = open_checkpoint(base)
    rng = np.random.default_rng(3)
    factors, tensors = {}, {}
    for name, stored in source.store.items():
        linear = name.removesuffix(".weight")
        if not linear.endswith(LINEARS):
            continue
        outside, inside = stored.ref.shape
        network = make(linear, inside, outside)
        if network is None:
            continue
        factors[linear] = network
        for ref in network.tensors():
            scale = prod(ref.shape) ** (-0.5 / len(ref.shape))
            core = (scale * rng.standard_normal(ref.shape)).astype(np.float32)
            tensors[ref.name] = NewTensor(ref.name, "float32", ref.shape, lambda core=core: core)
    if not factors:
        return base
    (folder / "model").mkdir()
    write_checkpoint(folder / "model", source, list(tensors.values()), factors, {"method": structure})
    return folder / "model"
