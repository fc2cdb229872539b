"""The model of a GPU's kernels, against figures worked out by hand and against what must hold of any model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixt_export.network import FactorizedLinear, build
from mixt_export.plan import Gpu, Operation, choose_forms, forms_of, seconds
from mixt_export.plan.fusion import fused_seconds, parts
from mixt_export.plan.gpu import tile_macs

#: 75 GB/s and 55 GFLOPS reached, 1 MB of cache, 1 ms to start a kernel: times that a pencil can check.
PENCIL = Gpu("pencil", bandwidth=100e9, flops=100e9, cache=1 << 20, processors=16, launch=1e-3)
ORIN = Gpu("orin", bandwidth=204.8e9, flops=42.5e12, cache=4 << 20, processors=16)


def product(inner: int, columns: int) -> Operation:
    return Operation("right", 1, 1, inner, columns, inner * columns)


def test_a_kernel_that_reads() -> None:
    """One token, 1024 x 1024: 2 MiB of weights and 4 KiB of activations at 75 GB/s."""
    expected = (2 * 1024 * 1024 + 2 * 2048) / 75e9 + 1e-3
    quick = replace(PENCIL, flops=1e15)
    assert quick.seconds([product(1024, 1024)], 1) == pytest.approx(expected, rel=1e-12)


def test_a_kernel_that_computes() -> None:
    """2048 tokens: 2 · 2048 · 1024² operations at 55 GFLOPS take longer than the bytes."""
    expected = 2 * 2048 * 1024**2 / 55e9 + 1e-3
    assert PENCIL.seconds([product(1024, 1024)], 2048) == pytest.approx(expected, rel=1e-12)


def test_narrow_sides_fill_tiles() -> None:
    assert tile_macs(Operation("right", 1, 16, 16, 4, 64), 1) == 16 * 16 * 8
    assert tile_macs(Operation("right", 1, 1, 1, 64, 64), 4) == 8 * 16 * 64  # four rows lie across: 8 instead of 16
    assert tile_macs(Operation("left", 2, 3, 5, 7, 35, tokens="batch"), 10) == 20 * 16 * 8 * 16
    assert tile_macs(Operation("left", 2, 3, 5, 7, 35), 10) == 2 * 16 * min(32 * 8, 32 * 16)
    assert tile_macs(Operation("transpose", moved=2048), 10) == 0


def test_intermediate_results_stay_near_until_they_outgrow_the_cache() -> None:
    """Two products over 64 hidden numbers; what is between them is read and written again beyond half the cache."""
    chain = [product(1024, 1024), product(1024, 1024)]
    weights, ends = 2 * 1024 * 1024, 2 * 1024 * 2
    near = PENCIL.seconds(chain, 128) - 2e-3
    far = PENCIL.seconds(chain, 4096) - 2e-3
    assert near == pytest.approx(2 * 2 * 128 * 1024**2 / 55e9)
    wide = Gpu("wide", 100e9, 1e18, 1 << 20, 16, launch=0.0)
    assert wide.seconds(chain, 128) == pytest.approx((2 * weights + 128 * ends) / 75e9)
    assert wide.seconds(chain, 4096) == pytest.approx((2 * weights + 2 * 4096 * ends) / 75e9)
    assert far > near


def test_reshapes_are_free_and_everything_else_is_a_kernel() -> None:
    moves = [Operation("reshape"), Operation("transpose", moved=4096), Operation("elementwise", moved=3 * 2048)]
    assert PENCIL.seconds(moves, 1) == pytest.approx(2e-3, rel=1e-3)
    assert PENCIL.seconds(moves[:1], 1) == 0


def test_float32_moves_twice_the_bytes() -> None:
    wide = Gpu("wide", 100e9, 1e18, 1 << 20, 16, item=4, launch=0.0)
    half = Gpu("half", 100e9, 1e18, 1 << 20, 16, item=2, launch=0.0)
    assert wide.seconds([product(64, 64)], 3) == pytest.approx(2 * half.seconds([product(64, 64)], 3))


#: µs per linear 4096 x 4096 on an AGX Orin with 3 µs a launch, by hand from the formula, rounded: 1, 8, 128, 512, 2048.
BY_HAND = {
    "dense": (222, 222, 235, 738, 2943),
    "low rank 64": (13, 14, 26, 67, 231),
    "tensor train 16": (8, 12, 240, 936, 3721),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_orin(name: str) -> None:
    linears: dict[str, FactorizedLinear] = {
        "dense": build.dense("l", 4096, 4096),
        "low rank 64": build.low_rank("l", 4096, 4096, 64),
        "tensor train 16": build.tensor_train("l", (64, 64), (64, 64), (16,)),
    }
    form = forms_of(linears[name])[0]
    assert (
        tuple(round(1e6 * ORIN.seconds(form.operations, tokens)) for tokens in (1, 8, 128, 512, 2048)) == BY_HAND[name]
    )


def test_a_fused_low_rank_repeats_its_first_product() -> None:
    """One token: 16 processors each make the 64 numbers between the factors, from 15 more reads of the first."""
    linear = build.low_rank("l", 4096, 4096, 64)
    first, second = parts(linear, forms_of(linear)[0])
    assert (first.done, second.done, first.weights, first.macs) == (0.0, 1.0, 4096 * 64, 4096 * 64)
    read = (2 * 2 * 4096 * 64 + 4 * 4096) / (0.75 * 204.8e9)
    again = 15 * 2 * 4096 * 64 / (2.9 * 0.75 * 204.8e9)
    found = fused_seconds(linear, forms_of(linear)[0], 1, ORIN)
    assert found == pytest.approx(read + again + 3e-6, rel=1e-9)


def test_fusing_pays_for_tensor_trains_and_mixt_not_for_low_rank() -> None:
    def gain(linear: FactorizedLinear, tokens: int) -> float:
        form = forms_of(linear)[0]
        return ORIN.seconds(form.operations, tokens) / fused_seconds(linear, form, tokens, ORIN)

    for tokens in (1, 128, 512):
        assert gain(build.tensor_train("l", (64, 64), (64, 64), (16,)), tokens) > 1.2
        assert gain(build.mixt("l", 4096, 4096, 4), tokens) > 1.5
        assert gain(build.low_rank("l", 4096, 4096, 256), tokens) < 1.0
    dense = build.dense("l", 64, 64)
    assert gain(dense, 7) == 1.0


def test_parts_of_a_train_count_the_output_modes_done() -> None:
    linear = build.tensor_train("l", (4, 4, 4), (2, 4, 8), (3, 3))
    form = next(form for form in forms_of(linear) if form.name == "chain")
    assert [part.done for part in parts(linear, form)] == pytest.approx([1 / 6, 3 / 6, 1.0])
    assert sum(part.macs for part in parts(linear, form)) == form.macs


def test_the_planner_weighs_launches_of_a_gpu() -> None:
    """On a GPU that starts kernels slowly a MixT of small matrices is better merged; on the CPU's model it is not."""
    linear = build.mixt("m", 256, 256, 4)
    slow = Gpu("slow", 204.8e9, 42.5e12, 4 << 20, 16, launch=1e-3)
    on_gpu = choose_forms([linear], "decode", device=slow).choices["m"].form
    assert len(on_gpu.operations) <= min(len(form.operations) for form in forms_of(linear) if not form.dense)
    assert seconds(on_gpu, 1, slow) == slow.seconds(on_gpu.operations, 1)
