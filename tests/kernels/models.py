"""Tiny models whose linears kernels can serve, once tiles that mostly execute padding are allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.network import FactorizedLinear, build
from mixt_export.runtime import toolkit
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.building import models

#: Sizes of the tiny models' features as two sites whose last one is a multiple of 8.
_SITES = {32: (4, 8), 48: (6, 8), 64: (8, 8), 104: (13, 8)}


def _train(name: str, inside: int, outside: int) -> FactorizedLinear:
    return build.tensor_train(name, _SITES[inside], _SITES[outside], (5,))


MAKERS: dict[str, models.Make] = {"train2": _train}
#: What the linears are kept in, whatever the planner would prefer at these sizes.
_FORMS = {"train2": "chain", "mixt": "branches"}


def exported(
    monkeypatch: pytest.MonkeyPatch, folder: Path, structure: str, *, jetpack: int = 7, dtype: str = "fp16",
    verify: bool = False, **options: object,
) -> Path:  # fmt: skip
    """A tiny model of ``structure`` (of MAKERS, or of tests.building.models) exported for TensorRT; OUT."""
    monkeypatch.setattr(toolkit("tactics"), "LARGEST_WASTE", 1e9)
    for name, make in MAKERS.items():
        monkeypatch.setitem(models.STRUCTURES, name, make)
    model = models.write_structure(folder / "source", structure)
    settings = TrtOptions(jetpack=jetpack, max_input_len=16)
    forms = [(".*", _FORMS[structure])] if structure in _FORMS else []
    result = export(
        model,
        folder / "out",
        target="trt",
        dtype=dtype,
        max_seq_len=64,
        trt=settings,
        verify=verify,
        forms=forms,
        **options,
    )
    assert result.ok, result.report
    return folder / "out"
