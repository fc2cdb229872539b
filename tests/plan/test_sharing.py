"""Steps that linears share: exact, computed once, only where it pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef, apply, build, densify
from mixt_export.plan import choose_forms
from mixt_export.plan.objectives import OBJECTIVES
from mixt_export.plan.sharing import Sharing, _signature, share, shared_again, split

BALANCED = OBJECTIVES["balanced"]


def heads(
    ranks: tuple[int | None, int | None, int | None] = (64, 4, 2),
    roles: str = "qkvo",
    sizes: tuple[int, int, int, int] = (4096, 32, 128, 32),
) -> list[FactorizedLinear]:
    features, number, dim, kv = sizes
    return [
        build.tucker_heads(
            f"m.attn.{role}_proj", role, features, number, dim, ranks, shared="m.attn.tucker", kv_heads=kv
        )
        for role in roles
    ]


def basis(names: Sequence[str], rank: int = 16) -> list[FactorizedLinear]:
    """Linears over one basis, 96 -> 64."""
    return [build.low_rank(name, 96, 64, rank, names=("basis", f"{name}.core1")) for name in names]


def values(linears: Sequence[FactorizedLinear]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {ref.name: rng.standard_normal(ref.shape) for linear in linears for ref in linear.tensors()}


def run(sharing: Sharing, name: str, load: Callable[[str], np.ndarray], x: np.ndarray) -> np.ndarray:
    """What the linear computes through its heads."""
    if name in sharing.reads:
        x = run(sharing, sharing.reads[name], load, x)
    return apply(sharing.networks[name], load, x)


@pytest.mark.parametrize(
    "linears",
    [
        heads((6, 4, 2), sizes=(24, 4, 6, 4)),
        heads((6, 4, 5), sizes=(24, 6, 4, 2)),
        heads((9, None, 3), sizes=(24, 6, 4, 2)),
        heads((9, None, None), sizes=(24, 6, 4, 2)),
        heads((None, 3, 2), sizes=(24, 4, 6, 4)),
        basis(["a.q", "a.k", "a.v"]),
        [*basis(["a.q", "a.k"]), build.low_rank("a.v", 96, 64, 7, bias=True), build.mixt("a.o", 96, 64, 3)],
    ],
    ids=["heads", "grouped", "two axes", "one axis", "no first factor", "basis", "mixed"],
)
def test_heads_and_tails_are_the_linears(linears: list[FactorizedLinear]) -> None:
    numbers = values(linears)
    sharing = share(linears, BALANCED)
    assert set(sharing.networks) >= {linear.name for linear in linears}
    x = np.random.default_rng(1).standard_normal((3, linears[0].in_features))
    for linear in linears:
        if linear.in_features != x.shape[1]:
            continue
        whole = x @ densify(linear, numbers.__getitem__).T
        whole = whole if linear.bias is None else whole + numbers[linear.bias.name]
        np.testing.assert_allclose(run(sharing, linear.name, numbers.__getitem__, x), whole, atol=1e-9)


def test_tensorllm_on_llama_does_what_it_says() -> None:
    """279 k parameters, 0.62 M multiply-adds for all four projections (67.1 M dense): U1ᵀx of q, k, v once."""
    linears = heads()
    plan = choose_forms(linears)
    assert plan.stored_elements == 279_048
    assert plan.dense_elements == 67_108_864
    assert sum(choice.form.macs for choice in plan.choices.values()) == 622_592
    assert sum(choose_forms([linear]).choices[linear.name].form.macs for linear in linears) == 622_592 + 2 * 4096 * 64
    (head,) = plan.sharing.heads
    assert head == "m.attn.q_proj+k_proj+v_proj.u1"
    assert plan.choices[head].form.macs == 4096 * 64
    assert plan.choices[head].form.elements == 4096 * 64
    assert set(plan.sharing.reads) == {f"m.attn.{role}_proj" for role in "qkv"}
    assert "the rest after q_proj+k_proj+v_proj's u1: " in plan.choices["m.attn.k_proj"].reason


def test_the_longest_common_prefix_is_shared() -> None:
    """R3 = 1, as published for LLaMA-2 (1920,60,1): q, k and v differ in a factor, all products are common."""
    linears = heads((1920, 60, 1))
    sharing = share(linears, BALANCED)
    first, second, third = (f"m.attn.q_proj+k_proj+v_proj.{core}" for core in ("u1", "core", "u2"))
    assert (sharing.reads[third], sharing.reads[second]) == (second, first)
    assert {sharing.reads[f"m.attn.{role}_proj"] for role in "qkv"} == {third}
    assert [name for name in sharing.networks if name in sharing.heads] == [first, second, third]
    macs = [choice.form.macs for choice in choose_forms(linears).choices.values()]
    inner, core, outer = 4096 * 1920, 1920 * 32 * 60, 32 * 60 * 128
    assert sum(macs) == (inner + core + outer) + (outer + inner)  # o merges its core into U1: they are as large


def test_a_prefix_of_some_is_shared_by_some() -> None:
    other = build.low_rank("a.v", 96, 64, 16)
    sharing = share([*basis(["a.q", "a.k"]), other], BALANCED)
    assert set(sharing.reads) == {"a.q", "a.k"}
    assert sharing.networks["a.v"] == other
    assert sharing.first("a.q") == "a.q+k.basis"
    assert sharing.first("a.v") == "a.v"


@pytest.mark.parametrize(
    "linears",
    [
        [build.low_rank(name, 96, 64, 16) for name in ("a.q", "a.k")],
        [*basis(["a.q"]), *basis(["b.q"])],
        basis(["a.q"]),
        [build.mixt(name, 96, 64, 3, names=["t"] * 3) for name in ("a.q", "a.k")],
        [
            build.low_rank("a.q", 96, 64, 16, names=("square", "q1")),
            build.low_rank("a.k", 64, 96, 96, names=("other", "square2")),
        ],
        [build.with_sparse(linear, 5) for linear in basis(["a.q", "a.k"])],
    ],
    ids=["own tensors", "other modules", "alone", "branches", "other tensors", "sparse"],
)
def test_what_has_nothing_in_common_stays(linears: list[FactorizedLinear]) -> None:
    sharing = share(linears, BALANCED)
    assert sharing.reads == {}
    assert dict(sharing.networks) == {linear.name: linear for linear in linears}


def test_one_tensor_used_the_other_way_round_is_another_step() -> None:
    """Square, so that only the labels tell: x·B for the one, B·x for the other."""

    def linear(name: str, labels: tuple[str, str]) -> FactorizedLinear:
        cores = (
            Core(TensorRef("square", (64, 64), "float32"), labels),
            Core(TensorRef(f"{name}.own", (64, 512), "float32"), ("r", "o")),
        )
        return FactorizedLinear(name, 64, 512, (Branch((("i", 64),), (("o", 512),), cores),))

    def signatures(*linears: FactorizedLinear) -> int:
        return len({_signature(linear.branches[0], 0) for linear in linears})

    assert signatures(linear("a.q", ("i", "r")), linear("a.k", ("i", "r"))) == 1
    assert signatures(linear("a.q", ("i", "r")), linear("a.k", ("r", "i"))) == 2


def test_nothing_is_shared_where_the_whole_matrices_are_faster() -> None:
    """A basis as wide as the features: two products for one, unless no number may be added."""
    wide = [build.low_rank(f"a.{name}", 512, 16, 512, names=("basis", f"{name}1")) for name in "qk"]
    assert not share(wide, OBJECTIVES["balanced"]).reads


def test_forms_that_are_asked_for_are_those_of_the_whole_linear() -> None:
    plan = choose_forms(heads(), overrides=[("k_proj", "dense")])
    assert plan.choices["m.attn.k_proj"].form.macs == 4096 * 4096
    assert plan.sharing.heads == ("m.attn.q_proj+v_proj.u1",)


def test_split_keeps_scale_and_bias_in_the_tail() -> None:
    linear = build.low_rank("a.q", 12, 10, 3, bias=True)
    head, tail = split(linear, 0, "head")
    assert (head.in_features, head.out_features, head.bias) == (12, 3, None)
    assert (tail.in_features, tail.out_features, tail.bias) == (3, 10, linear.bias)


@pytest.mark.parametrize("linears", [heads(), heads((9, None, None), sizes=(24, 6, 4, 2)), basis(["a.q", "a.k"])])
def test_a_written_sharing_is_read_again(linears: list[FactorizedLinear]) -> None:
    sharing = share(linears, BALANCED)
    cores = {head: sharing.networks[head].branches[0].cores[0].tensor.name for head in sharing.heads}
    assert cores
    given = {linear.name: linear for linear in linears}
    assert shared_again(given, sharing.reads, cores) == sharing.networks
    assert shared_again(given, {"x": "y", "m.attn.q_proj": "m.attn.q_proj"}, {"y": "no such tensor"}) == given
