"""Parameters, bytes and multiply-adds against closed formulas and published counts."""

from math import prod

import pytest

from mixt_export.errors import NetworkError
from mixt_export.network import TensorRef, build, macs
from mixt_export.network.matmuls import schedule


@pytest.mark.parametrize(
    ("in_features", "out_features", "padded", "params", "multiply_adds"),
    [
        (4096, 4096, True, 1_048_576, 8_388_608),
        (4096, 11008, True, 4_194_304, 33_554_432),
        (11008, 4096, True, 4_194_304, 33_554_432),
        (4096, 11008, False, 4 * 1376 * 512, 4096 * 11008 // 2),
        (576, 1536, False, 576 * 1536 // 16, 576 * 1536 // 2),
    ],
)
def test_mixt(in_features: int, out_features: int, padded: bool, params: int, multiply_adds: int) -> None:
    """arXiv:2605.25344 eq. 2: parameters N/d^(2N-2) of the (padded) dense ones; executed MACs N/d^(N-1)."""
    linear = build.mixt("m", in_features, out_features, 4, paper_padding=padded)
    assert linear.params == params
    assert macs(linear) == multiply_adds


def test_mixt_of_three_and_five_terms() -> None:
    for terms in (3, 5):
        linear = build.mixt("m", 4096, 4096, terms)
        assert linear.params * 2 ** (2 * terms - 2) == terms * 4096**2
        assert macs(linear) * 2 ** (terms - 1) == terms * 4096**2


def test_tensor_train_of_order_twelve() -> None:
    """TT-LLM's order 12, rank 64 on 4096 × 4096: 107,040 parameters, 219 M MACs from right to left."""
    ranks = [min(4**k, 4 ** (12 - k), 64) for k in range(1, 12)]
    linear = build.tensor_train("t", [2] * 12, [2] * 12, ranks)
    assert linear.params == 107_040
    r = [1, *ranks, 1]
    right_to_left = sum(2 ** (k - 1) * 2 * r[k] * 2 ** (12 - k) * 2 * r[k - 1] for k in range(1, 13))
    assert macs(linear, [tuple(range(11, -1, -1))]) == right_to_left
    assert round(right_to_left / 1e6) == 219
    assert macs(linear) <= right_to_left


@pytest.mark.parametrize(("rank", "params", "multiply_adds"), [(16, 131_072, 8_388_608), (64, 524_288, 33_554_432)])
def test_two_site_operator(rank: int, params: int, multiply_adds: int) -> None:
    linear = build.tensor_train("t", (64, 64), (64, 64), (rank,))
    assert (linear.params, macs(linear)) == (params, multiply_adds)
    kronecker = build.kronecker("k", (64, 64), (64, 64), rank)
    assert (kronecker.params, macs(kronecker)) == (params, multiply_adds)


def test_kronecker_takes_the_cheaper_end_first() -> None:
    (i, j), (o, p), terms = (3, 5), (2, 7), 4
    linear = build.kronecker("k", (i, j), (o, p), terms)
    assert linear.params == terms * (o * i + p * j)
    assert macs(linear) == terms * min(o * i * j + o * p * j, p * j * i + p * o * i)


def test_matrices() -> None:
    assert build.dense("d", 7, 5, bias=True).params == 7 * 5 + 5
    low_rank = build.low_rank("l", 7, 5, 3, bias=True, dtype="float16")
    assert (low_rank.params, low_rank.nbytes, macs(low_rank)) == (3 * 12 + 5, 2 * (3 * 12 + 5), 3 * 12)
    tucker = build.tucker2("t", 70, 50, 8, 6)
    assert tucker.params == macs(tucker) == 70 * 8 + 8 * 6 + 6 * 50


def test_blocks() -> None:
    blast = build.blast("b", 15, 14, 4, (7, 3))
    assert blast.params == macs(blast) == 4 * (15 + 14) + 7 * 3 * 4
    monarch = build.monarch("m", (8, 8), (8, 8))
    assert monarch.params == macs(monarch) == 2 * 64 * 8
    (a, b, g), (d, e, f), r = (3, 5, 2), (4, 2, 3), 2
    btt = build.block_tensor_train("t", (a, b, g), (d, e, f), r)
    first, second = a * g * d * f * r, b * g * e * f * r
    assert btt.params == first + second
    assert macs(btt, [(0, 1)]) == first * b + second * d
    assert macs(btt) <= first * b + second * d


def test_tensor_ring() -> None:
    i, o, r = (3, 5, 2), (2, 3, 4), (4, 3, 2)
    assert build.tensor_ring("t", i, o, r).params == sum(r[k - 1] * o[k] * i[k] * r[k] for k in range(3))


def test_tucker_heads_share_their_factors() -> None:
    """TensorLLM: h·R1·R2·R3 + d·R1 + d_v·R2 + 4·R3 for the four projections together (GPT-J's 247.30×)."""
    h, d, dv, (r1, r2, r3) = 16, 4096, 256, (64, 4, 2)
    linears = [build.tucker_heads(f"a.{p}", p, d, h, dv, (r1, r2, r3), shared="a") for p in "qkvo"]
    stored = {tensor.name: tensor.size for linear in linears for tensor in linear.tensors()}
    total = sum(stored.values())
    assert total == h * r1 * r2 * r3 + d * r1 + dv * r2 + 4 * r3
    assert round(4 * d * d * 1.0 / total, 2) == pytest.approx(247.30, abs=0.02)


def test_a_shared_tensor_counts_once() -> None:
    linear = build.kronecker("k", (3, 3), (2, 2), 2, names=("w", "w"))
    assert linear.params == 2 * 2 * 3
    assert linear.tensors() == (TensorRef("w", (2, 2, 3), "float32"),)


def test_sparse_indices_are_bytes_and_no_parameters() -> None:
    linear = build.with_sparse(build.low_rank("l", 7, 5, 3), 9)
    assert linear.params == 3 * 12 + 9
    assert linear.nbytes == 4 * (3 * 12 + 9) + 2 * 8 * 9
    assert macs(linear) == 3 * 12 + 9


def test_orders_of_another_length_or_kind_are_refused() -> None:
    linear = build.low_rank("layer", 7, 5, 3)
    with pytest.raises(NetworkError, match=r"'layer'.*one order per branch"):
        macs(linear, [])
    with pytest.raises(NetworkError, match=r"'layer'.*permutation of the 2 cores"):
        macs(linear, [(0, 0)])


def test_a_contraction_without_bound_is_refused() -> None:
    """Many bonds of moderate size between few cores: small files, an intermediate that no machine holds."""
    linear = build.tensor_ring("ring", (8,) * 8, (8,) * 8, (4096,) * 8)
    with pytest.raises(NetworkError, match=r"Linear 'ring': .*'ring.core0'.* elements per token"):
        macs(linear)


def test_activations_stay_in_place_where_they_can() -> None:
    """Low rank and heads move nothing, MixT twice per branch but the last; a wide suffix multiplies from the left."""
    assert schedule(build.low_rank("l", 64, 48, 8).branches[0]).transposes == 0
    assert schedule(build.tucker_heads("q", "q", 64, 4, 16, (8, 4, 2), shared="s").branches[0]).transposes == 0
    counts = [schedule(branch).transposes for branch in build.mixt("m", 64, 64, 4).branches]
    assert counts == [2, 2, 2, 0]
    wide = build.kronecker("k", (4, 128), (4, 128)).branches[0]
    assert [step.form for step in schedule(wide, (0, 1)).steps] == ["left", "right"]
    assert schedule(wide, (0, 1)).transposes == 0
    assert prod(size for _, size in wide.out_modes) == 512
