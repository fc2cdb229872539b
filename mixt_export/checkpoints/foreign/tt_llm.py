"""TT-LLM: tensor trains under the name `tt_cores`, W[o1…od, i1…id] = G1[o1,i1] · … · Gd[od,id].

Written by https://github.com/brain-lab-research/TT-LLM (src/tt_llm/tt_linear.py): `<linear>.tt_cores.<k>`
(r_{k-1}, o_k, i_k, r_k) with r_0 = r_d = 1, `<linear>.bias`. config.json is that of the dense model.
"""

from __future__ import annotations

import re
from pathlib import Path

from mixt_export.checkpoints import huggingface
from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.foreign.names import stored_names
from mixt_export.checkpoints.foreign.pairs import refuse_mixture
from mixt_export.checkpoints.store import TensorStore
from mixt_export.checkpoints.weights import open_weights
from mixt_export.errors import CheckpointError
from mixt_export.network import Branch, Core, FactorizedLinear

NAME = "tt-llm"
_CORE = re.compile(r"(.+)\.tt_cores\.(0|[1-9][0-9]{0,2})")
_AGAIN = "download or write the model again"


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None. Reads the headers of the weights."""
    name = next((name for name in stored_names(folder) if _CORE.fullmatch(name)), None)
    return None if name is None else f"the tensor {name!r}"


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder; see open_checkpoint."""
    config = huggingface.read_config(folder)
    store = open_weights(folder)
    refuse_mixture(folder, store, "TT-LLM")
    sites: dict[str, dict[int, str]] = {}
    for name in store:
        match = _CORE.fullmatch(name)
        if match is not None:
            sites.setdefault(match[1], {})[int(match[2])] = name
    factors = {linear: _linear(folder, store, linear, names) for linear, names in sites.items()}
    return Checkpoint(folder, NAME, reason, config, store, factors)


def _linear(folder: Path, store: TensorStore, linear: str, names: dict[int, str]) -> FactorizedLinear:
    missing = next((site for site in range(max(names) + 1) if site not in names), None)
    if missing is not None:
        raise CheckpointError(
            f"{folder}: the linear {linear!r} lacks {linear}.tt_cores.{missing}, which is in no weight file; {_AGAIN}."
        )
    if f"{linear}.weight" in store:
        raise CheckpointError(
            f"{folder}: {linear!r} is stored both as a tensor train and dense ({linear}.weight); remove one of the two."
        )
    refs = [store[names[site]].ref for site in range(len(names))]
    bonds = [1, *(ref.shape[3] if len(ref.shape) == 4 else -1 for ref in refs)]
    if bonds[-1] != 1 or any(len(ref.shape) != 4 or ref.shape[0] != bonds[site] for site, ref in enumerate(refs)):
        shapes = ", ".join(str(ref.shape) for ref in refs)
        raise CheckpointError(
            f"{folder}: the tensor train of {linear!r} has cores {shapes}, which do not fit one another as "
            f"(rank, out, in, rank) from rank 1 to rank 1; {_AGAIN}."
        )
    cores = tuple(
        Core(ref, (f"r{site}", f"o{site + 1}", f"i{site + 1}", f"r{site + 1}")) for site, ref in enumerate(refs)
    )
    outputs = tuple((f"o{site}", ref.shape[1]) for site, ref in enumerate(refs, 1))
    inputs = tuple((f"i{site}", ref.shape[2]) for site, ref in enumerate(refs, 1))
    branch = Branch(inputs, outputs, cores)
    bias = store.refs.get(f"{linear}.bias")
    return FactorizedLinear(linear, branch.in_size, branch.out_size, (branch,), bias, NAME)
