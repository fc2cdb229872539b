"""What the constructors refuse, in one sentence that names the place, what was expected and what was found."""

from collections.abc import Callable

import pytest

from mixt_export.errors import NetworkError
from mixt_export.network import Branch, Core, FactorizedLinear, SparseResidual, TensorRef, build


def ref(name: str, *shape: int, dtype: str = "float32") -> TensorRef:
    return TensorRef(name, shape, dtype)


def core(name: str, labels: str, *shape: int) -> Core:
    return Core(ref(name, *shape), tuple(labels))


def low_rank(**changes: object) -> FactorizedLinear:
    branch = Branch((("i", 4),), (("o", 6),), (core("l.core0", "ir", 4, 2), core("l.core1", "ro", 2, 6)))
    fields: dict[str, object] = {"name": "l", "in_features": 4, "out_features": 6, "branches": (branch,)} | changes
    return FactorizedLinear(**fields)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "tensor without name": (lambda: ref("", 2), "non-empty name, found ''"),
    "negative axis": (lambda: ref("w", 2, -1), r"'w': expected a shape of non-negative integers, found \(2, -1\)"),
    "boolean axis": (lambda: TensorRef("w", (True,), "float32"), "'w': expected a shape"),
    "list as shape": (lambda: TensorRef("w", [2], "float32"), "'w': expected a shape"),  # type: ignore[arg-type]
    "unknown dtype": (lambda: ref("w", 2, dtype="float12"), "'w': unknown dtype 'float12'"),
    "axes and labels differ": (
        lambda: core("w", "ab", 2, 3, 4),
        r"'w': expected one axis per label \(a, b\), found shape \(2, 3, 4\) with 3 axes",
    ),
    "label twice in a core": (lambda: core("w", "aba", 2, 3, 2), "'w': expected each label once, found 'a' twice"),
    "empty axis in a core": (lambda: core("w", "ab", 2, 0), "'w': expected axes of at least 1"),
    "integer core": (lambda: Core(ref("w", 2, dtype="int32"), ("a",)), "'w': expected a floating dtype, found int32"),
    "too many axes": (lambda: core("w", "abcdefghijklmnopq", *[1] * 17), "'w': expected at most 16 axes, found 17"),
    "labels as text": (lambda: Core(ref("w", 2), "a"), "'w': expected a tuple of labels"),  # type: ignore[arg-type]
    "label that is no identifier": (lambda: Core(ref("w", 2), ("a->b",)), "'w': a label is .* found 'a->b'"),
    "label of two sizes": (
        lambda: Branch((("i", 4),), (("o", 6),), (core("u", "ir", 4, 2), core("v", "ro", 3, 6))),
        "Label 'r' of core 'v': expected size 2 as in core 'u', found 3",
    ),
    "mode of another size than the core": (
        lambda: Branch((("i", 5),), (("o", 6),), (core("u", "io", 4, 6),)),
        "Label 'i' of core 'u': expected size 5 as in the input modes, found 4",
    ),
    "output mode of another size": (
        lambda: Branch((("i", 4),), (("o", 7),), (core("u", "io", 4, 6),)),
        "Label 'o' of the output modes: expected size 6 as in core 'u', found 7",
    ),
    "unreachable output": (
        lambda: Branch((("i", 4),), (("o", 6), ("p", 2)), (core("u", "io", 4, 6),)),
        "Output label 'p' cannot be reached",
    ),
    "unread input": (
        lambda: Branch((("i", 4), ("j", 2)), (("o", 6),), (core("u", "io", 4, 6),)),
        "Input label 'j' is read by nobody",
    ),
    "bond with one end": (
        lambda: Branch((("i", 4),), (("o", 6),), (core("u", "ior", 4, 6, 3),)),
        "Label 'r' of core 'u': expected a second end",
    ),
    "no input modes": (lambda: Branch((), (("o", 6),), ()), r"one or more input modes, found \(\)"),
    "mode of size zero": (lambda: Branch((("i", 0),), (("i", 0),), ()), "input modes .* found .'i', 0."),
    "mode label twice": (
        lambda: Branch((("i", 2), ("i", 2)), (("i", 2),), ()),
        "input modes of a branch: expected each label once, found 'i' twice",
    ),
    "scale not finite": (lambda: Branch((("i", 2),), (("i", 2),), (), scale=float("nan")), "finite number, found nan"),
    "scale beyond float": (lambda: Branch((("i", 2),), (("i", 2),), (), scale=10**400), "finite number"),
    "padded not boolean": (
        lambda: Branch((("i", 2),), (("i", 2),), (), padded=1),  # type: ignore[arg-type]
        "padded is true or false, found 1",
    ),
    "cores as list": (
        lambda: Branch((("i", 2),), (("i", 2),), []),  # type: ignore[arg-type]
        r"tuple of at most 64 cores, found \[\]",
    ),
    "too many cores": (
        lambda: Branch((("i", 2),), (("i", 2),), (core("u", "i", 2),) * 65),
        "at most 64 cores, found 65",
    ),
    "too many labels": (
        lambda: Branch(*[tuple((f"a{k}", 1) for k in range(51))] * 2, ()),
        "at most 50 labels, found 51",
    ),
    "modes beyond any layer": (
        lambda: Branch((("i", 2**20), ("j", 2**20)), (("i", 2**20), ("j", 2**20)), ()),
        "input modes of a branch multiply up to 1099511627776",
    ),
    "modes that do not multiply up": (
        lambda: low_rank(in_features=5),
        r"'l', branch 0 with cores 'l.core0', 'l.core1': expected input modes that multiply up to 5, found i:4 = 4",
    ),
    "output modes that do not multiply up": (
        lambda: low_rank(out_features=7),
        "'l', branch 0 .* expected output modes that multiply up to 7, found o:6 = 6",
    ),
    "padding too small": (
        lambda: low_rank(
            in_features=5, branches=(Branch((("i", 4),), (("o", 6),), (core("u", "io", 4, 6),), padded=True),)
        ),
        "'l', branch 0 .* expected input modes that multiply up to 5 to 320 .padded., found i:4 = 4",
    ),
    "absurd padding": (
        lambda: low_rank(branches=(Branch((("a", 2**20),), (("a", 2**20),), (), padded=True),)),
        "'l', branch 0 with cores .none.: expected input modes that multiply up to 4 to 256",
    ),
    "no name": (lambda: low_rank(name=""), "needs a non-empty name"),
    "no branches": (lambda: low_rank(branches=()), "'l': expected a tuple of 1 to 64 branches, found 0"),
    "no features": (lambda: low_rank(in_features=0), "'l': expected in_features in 1.."),
    "features not an integer": (lambda: low_rank(out_features=6.0), "'l': expected out_features in 1.."),
    "method not text": (lambda: low_rank(method=None), "'l': expected the method's name, found None"),
    "bias of another length": (
        lambda: low_rank(bias=ref("l.bias", 4)),
        r"'l': expected the bias 'l.bias' to be floats of shape \(6,\), found float32 \(4,\)",
    ),
    "integer bias": (lambda: low_rank(bias=ref("l.bias", 6, dtype="int8")), "'l': expected the bias .* int8"),
    "one name for two tensors": (
        lambda: low_rank(bias=ref("l.core1", 6)),
        r"'l': expected tensor 'l.core1' to be float32 \(2, 6\) everywhere, found float32 \(6,\)",
    ),
    "sparse of unequal lengths": (
        lambda: SparseResidual(ref("r", 3, dtype="int64"), ref("c", 2, dtype="int64"), ref("v", 3)),
        r"'c': expected a vector as long as the values \(3,\), found shape \(2,\)",
    ),
    "sparse values as matrix": (
        lambda: SparseResidual(ref("r", 3, 1, dtype="int64"), ref("c", 3, 1, dtype="int64"), ref("v", 3, 1)),
        "'v': expected a vector",
    ),
    "sparse indices as floats": (
        lambda: SparseResidual(ref("r", 3), ref("c", 3, dtype="int64"), ref("v", 3)),
        "'r': expected dtype int64 or int32, found float32",
    ),
    "sparse values as integers": (
        lambda: SparseResidual(ref("r", 3, dtype="int64"), ref("c", 3, dtype="int64"), ref("v", 3, dtype="int8")),
        "'v': expected dtype .* found int8",
    ),
    "rank zero": (lambda: build.low_rank("l", 4, 6, 0), "'l': expected rank of at least 1, found 0"),
    "rank not an integer": (lambda: build.low_rank("l", 4, 6, 2.0), "'l': expected rank"),  # type: ignore[arg-type]
    "wrong number of names": (
        lambda: build.low_rank("l", 4, 6, 2, names=["u"]),
        "'l': expected 2 core names, found 1",
    ),
    "wrong number of ranks": (
        lambda: build.tensor_train("l", (2, 2), (2, 2), (3, 3)),
        "'l': expected 1 inner ranks for 2 sites, found 2",
    ),
    "wrong number of ring ranks": (
        lambda: build.tensor_ring("l", (2, 2), (2, 2), (3,)),
        r"'l': expected one rank per site \(2\), found 1",
    ),
    "ring of one site": (lambda: build.tensor_ring("l", (2,), (2,), (3,)), "'l': .* at least 2, found 1"),
    "modes of unequal number": (
        lambda: build.kronecker("l", (2, 3), (2,)),
        r"'l': expected as many input as output modes, at least 2, found 2 \(product 6\) and 1 \(product 2\)",
    ),
    "monarch of three modes": (
        lambda: build.monarch("l", (2, 3, 2), (2, 2)),  # type: ignore[arg-type]
        "'l': expected two sizes in in_modes",
    ),
    "block tensor train of two modes": (
        lambda: build.block_tensor_train("l", (2, 3), (2, 2, 2), 1),  # type: ignore[arg-type]
        "'l': expected three input and three output modes",
    ),
    "blocks that do not divide": (
        lambda: build.blast("l", 15, 14, 2, (4, 3)),
        r"'l': expected blocks \(b1, b2\) that divide out 14 and in 15, found \(4, 3\)",
    ),
    "unknown projection": (
        lambda: build.tucker_heads("l", "x", 8, 2, 4, (2, 2, 2), shared="s"),
        "'l': expected a projection of q, k, v, o, found 'x'",
    ),
    "two ranks for three": (
        lambda: build.tucker_heads("l", "q", 8, 2, 4, (2, 2), shared="s"),  # type: ignore[arg-type]
        "'l': expected three ranks",
    ),
    "kv heads that do not divide": (
        lambda: build.tucker_heads("l", "q", 8, 3, 4, (2, 2, 2), shared="s", kv_heads=2),
        "'l': expected kv heads that divide 3 heads, found 2",
    ),
    "features that spectators do not divide": (
        lambda: build.mixt("l", 12, 12, 4),
        r"'l': expected features that 2\^3 = 8 divides, found in 12 and out 12; take fewer terms",
    ),
    "bond of one": (lambda: build.mixt("l", 8, 8, 2, bond=1), "'l': expected a local dimension bond of at least 2"),
    "terms without end": (lambda: build.mixt("l", 8, 8, 10**9), "'l': expected at most 64 terms, found 1000000000"),
    "wrong number of mixt names": (
        lambda: build.mixt("l", 8, 8, 2, names=["a"]),
        "'l': expected 2 core names, found 1",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(NetworkError, match=message):
        make()


def test_names_follow_the_convention() -> None:
    low = build.low_rank("a.b", 4, 6, 2, bias=True)
    assert [tensor.name for tensor in low.tensors()] == ["a.b.core0", "a.b.core1", "a.b.bias"]
    assert [core.shape for core in low.core_tensors()] == [(4, 2), (2, 6)]
    mixt = build.mixt("a.b", 8, 8, 2)
    assert [tensor.name for tensor in mixt.tensors()] == ["a.b.branch0.core0", "a.b.branch1.core0"]
    sparse = build.with_sparse(build.dense("a.b", 4, 6), 5)
    assert [tensor.name for tensor in sparse.tensors()][1:] == [
        f"a.b.sparse.{part}" for part in ("rows", "cols", "values")
    ]


def test_a_closed_linear_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        low_rank().in_features = 5  # type: ignore[misc]


def test_size_one_may_dangle() -> None:
    train = build.tensor_train("l", (4,), (6,), ())
    assert train.core_tensors()[0].shape == (1, 6, 4, 1)
