"""What a run of a low rank method leaves: the report of every linear, the IR and the cores of the factorised ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mixt_export.checkpoints import NewTensor
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.compression.allocation import Ranks
from mixt_export.compression.job import Job
from mixt_export.compression.profile import LinearProfile
from mixt_export.compression.report import LayerReport
from mixt_export.compression.scratch import Scratch
from mixt_export.network import FactorizedLinear, TensorRef, build


def known_of(profiles: Mapping[str, LinearProfile], name: str, rank: int | None) -> tuple[float, float]:
    """Tail and relative output error of ``rank`` under the dense model's statistics."""
    if rank is None:
        return 0.0, 0.0
    profile = profiles[name]
    error = float(profile.error[rank:].sum()) / profile.energy if profile.energy > 0 else 0.0
    return float(profile.candidate.loss[rank:].sum()), error


def layer_reports(job: Job, ranks: Ranks, known: Mapping[str, tuple[float, float]]) -> tuple[LayerReport, ...]:
    """The report of every target in their order; ``known``: path -> tail and error."""
    layers = []
    for name in job.targets:
        out_features, in_features = job.shape(name)
        rank, (tail, error) = ranks[name], known[name]
        params = out_features * in_features if rank is None else rank * (out_features + in_features)
        layers.append(
            LayerReport(
                name,
                out_features,
                in_features,
                "dense" if rank is None else "low_rank",
                params,
                params / (out_features * in_features),
                error,
                rank=rank,
                loss_tail=tail,
            )
        )
    return tuple(layers)


def stored_factors(job: Job, ranks: Ranks, scratch: Scratch) -> tuple[dict[str, FactorizedLinear], list[NewTensor]]:
    """The IR of every factorised linear, and its cores: ``up:`` and ``down:`` + path in ``scratch``, read at last."""
    factors: dict[str, FactorizedLinear] = {}
    tensors: list[NewTensor] = []
    store = job.checkpoint.store
    for name, rank in ranks.items():
        if rank is None:
            continue
        out_features, in_features = job.shape(name)
        linear = build.low_rank(
            name, in_features, out_features, rank, dtype=job.dtype(name), method=job.request.method.name
        )
        if f"{name}.bias" in store:
            linear = replace(linear, bias=store[f"{name}.bias"].ref)
        factors[name] = linear
        first, second = (core.tensor for core in linear.branches[0].cores)
        tensors.append(_new_tensor(first, scratch, f"down:{name}", np.s_[:rank]))
        tensors.append(_new_tensor(second, scratch, f"up:{name}", np.s_[:, :rank]))
    return factors, tensors


def _new_tensor(ref: TensorRef, scratch: Scratch, key: str, kept: Any) -> NewTensor:
    """A core: the kept directions of a stored factor, transposed to the layout of the IR."""

    def produce() -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(scratch.get(key)[kept].T).astype(numpy_dtype(ref.dtype))

    return NewTensor(ref.name, ref.dtype, ref.shape, produce)
