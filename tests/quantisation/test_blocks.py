"""Packing, and what ONNX Runtime makes of the bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mixt_export.errors import MixtError
from mixt_export.quantisation import Blocks, dequantised, packed_nbits, unpacked_nbits
from mixt_export.quantisation.blocks import distance, nbytes, packed_tensor, unpacked_tensor
from tests.quantisation import oracle

SHAPES = [(5, 64), (3, 33), (7, 20), (1, 128)]


def blocks(rows: int, columns: int, bits: int, group: int, seed: int = 0) -> Blocks:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    scales = rng.standard_normal((rows, -(-columns // group))).astype(np.float32)
    return Blocks(codes, scales, bits, group)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_operators_documentation(bits: int, group: int, shape: tuple[int, int]) -> None:
    made = blocks(*shape, bits, group)
    packed = packed_nbits(made)
    assert np.array_equal(packed, oracle.bytes_of(made.codes, bits, group))
    assert (packed.nbytes, made.scales.nbytes) == nbytes(*shape, bits, group)
    again = unpacked_nbits(packed, made.scales, shape[1], bits, group)
    assert np.array_equal(again.codes, made.codes)
    assert np.array_equal(again.scales, made.scales)
    exact = oracle.matrix_of(made.codes, made.scales, bits, group)
    assert np.allclose(dequantised(made), exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_of_the_standard_hold_the_same(bits: int, transposed: bool, shape: tuple[int, int]) -> None:
    made = blocks(*shape, bits, 16)
    packed = packed_tensor(made, transposed=transposed)
    assert packed.nbytes == -(-shape[0] * shape[1] * bits // 8)
    if bits == 8:
        signed = packed.T if transposed else packed
        assert np.array_equal(signed.astype(int), made.codes.astype(int) - 128)
    scales = made.scales.T if transposed else made.scales
    again = unpacked_tensor(packed, scales, shape, bits, 16, transposed=transposed)
    assert np.array_equal(again.codes, made.codes)
    assert np.array_equal(again.scales, made.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "columns"), [(16, 40), (32, 96), (32, 45), (64, 64)])
def test_onnxruntime_multiplies_by_what_the_blocks_stand_for(bits: int, group: int, columns: int) -> None:
    made = blocks(6, columns, bits, group)
    x = np.random.default_rng(1).standard_normal((2, 3, columns)).astype(np.float32)
    exact = x.astype(np.float64) @ oracle.matrix_of(made.codes, made.scales, bits, group).T
    found = oracle.product(x, packed_nbits(made), made.scales, columns, bits, group, level=1)
    assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "columns", "tokens"), [(16, 48, 1), (32, 96, 5), (32, 45, 1), (128, 256, 3)])
def test_accuracy_level_4_rounds_what_it_reads_to_127_steps_of_each_block(
    bits: int, group: int, columns: int, tokens: int
) -> None:
    made = blocks(6, columns, bits, group)
    x = np.random.default_rng(2).standard_normal((1, tokens, columns)).astype(np.float32)
    matrix = oracle.matrix_of(made.codes, made.scales, bits, group)
    rounded = oracle.rounded_rows(x[0], group) @ matrix.T
    found = oracle.product(x, packed_nbits(made), made.scales, columns, bits, group, level=4)[0]
    apart = np.linalg.norm(x[0].astype(np.float64) @ matrix.T - rounded)
    assert np.linalg.norm(found - rounded) < 1e-5 * np.linalg.norm(rounded)
    assert apart > 100 * np.linalg.norm(found - rounded)  # it does round


def test_distance_counts_norm_and_steps() -> None:
    made = Blocks(np.array([[9, 8, 7, 8]], np.uint8), np.array([[2.0]], np.float32), 4, 16)
    found = distance(made, np.array([[2.0, 1.0, -2.0, 0.0]]))
    assert found == pytest.approx({"error": 1 / 3, "steps": 0.5})


def test_scales_that_do_not_fit_are_refused() -> None:
    made: dict[str, Any] = {"codes": np.zeros((2, 40), np.uint8), "bits": 4, "group": 16}
    with pytest.raises(MixtError, match=r"\(2, 2\) scales for \(2, 40\) codes"):
        Blocks(scales=np.zeros((2, 2), np.float32), **made)
