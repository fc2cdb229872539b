"""Constants of a graph: one name, one value."""

from __future__ import annotations

import numpy as np
import pytest

from mixt_export.errors import MixtError
from mixt_export.lower.builder import GraphBuilder


def test_a_constant_is_stored_once_and_stands_for_one_value() -> None:
    builder = GraphBuilder("g", 20)
    first = builder.constant(np.array([1, 2]), "sizes")
    assert builder.constant(np.array([1, 2]), "sizes") is first
    with pytest.raises(MixtError, match="'sizes' stands for two values"):
        builder.constant(np.array([1, 3]), "sizes")
