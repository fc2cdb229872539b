"""The JSON of a linear: exact round trip, and refusal of everything that is not exactly that."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from mixt_export.errors import NetworkError
from mixt_export.network import TensorRef, build, from_json, to_json
from tests.network.cases import CASES, SPARSE_CASES, Case, identity


@pytest.mark.parametrize("case", CASES + SPARSE_CASES, ids=identity)
def test_round_trip_through_text(case: Case) -> None:
    linear = case.linear
    tensors = {tensor.name: tensor for tensor in linear.tensors()}
    assert from_json(linear.name, json.loads(json.dumps(to_json(linear))), tensors) == linear


def test_description_of_low_rank() -> None:
    assert to_json(build.low_rank("l", 4, 6, 2, bias=True)) == {
        "method": "low_rank",
        "in_features": 4,
        "out_features": 6,
        "branches": [
            {
                "in_modes": [["i", 4]],
                "out_modes": [["o", 6]],
                "scale": 1.0,
                "padded": False,
                "cores": [
                    {"tensor": "l.core0", "labels": ["i", "r"]},
                    {"tensor": "l.core1", "labels": ["r", "o"]},
                ],
            }
        ],
        "bias": "l.bias",
        "sparse": None,
    }


def _set(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(description: Any) -> None:
        for step in path[:-1]:
            description = description[step]
        description[path[-1]] = to

    return change


def _drop(*path: str | int) -> Callable[[Any], None]:
    def change(description: Any) -> None:
        for step in path[:-1]:
            description = description[step]
        del description[path[-1]]

    return change


BRANCH = ("branches", 0)
CORE = (*BRANCH, "cores", 0)
BROKEN: dict[str, tuple[Callable[[Any], None], str]] = {
    "unknown key": (_set("quant", to=4), "the description has the unknown key 'quant'"),
    "missing key": (_drop("bias"), "the description lacks 'bias'"),
    "unknown branch key": (_set(*BRANCH, "plan", to=[]), r"branches\[0\] has the unknown key 'plan'"),
    "missing branch key": (_drop(*BRANCH, "padded"), r"branches\[0\] lacks 'padded'"),
    "unknown core key": (_set(*CORE, "shape", to=[4, 2]), r"branches\[0\]\.cores\[0\] has the unknown key 'shape'"),
    "branches as dict": (_set("branches", to={}), "branches: expected list, found dict"),
    "branch as list": (_set(*BRANCH, to=[]), r"branches\[0\]: expected dict, found list"),
    "features as text": (_set("in_features", to="4"), "in_features: expected int, found str '4'"),
    "features as float": (_set("in_features", to=4.0), "in_features: expected int, found float"),
    "features as boolean": (_set("in_features", to=True), "in_features: expected int, found bool"),
    "features absurd": (_set("in_features", to=2**40), "expected in_features in 1..2147483648, found 1099511627776"),
    "features negative": (_set("out_features", to=-6), "expected out_features in 1.."),
    "method as number": (_set("method", to=3), "method: expected str, found int"),
    "scale as text": (_set(*BRANCH, "scale", to="1"), r"branches\[0\]\.scale: expected a finite number, found '1'"),
    "scale beyond float": (_set(*BRANCH, "scale", to=10**400), r"branches\[0\]\.scale: expected a finite number"),
    "scale not finite": (_set(*BRANCH, "scale", to=float("inf")), r"branches\[0\]\.scale: expected a finite number"),
    "padded as number": (_set(*BRANCH, "padded", to=0), r"branches\[0\]\.padded: expected bool, found int"),
    "mode without size": (_set(*BRANCH, "in_modes", to=[["i"]]), r"in_modes: expected \[label, size\], found \['i'\]"),
    "mode of three": (_set(*BRANCH, "in_modes", to=[["i", 4, 4]]), "in_modes: expected at most 2 entries, found 3"),
    "mode size as text": (_set(*BRANCH, "in_modes", to=[["i", "4"]]), "in_modes: expected int, found str"),
    "mode size absurd": (_set(*BRANCH, "in_modes", to=[["i", 10**30]]), r"branches\[0\]: .* multiply up to 1000"),
    "mode of another size": (_set(*BRANCH, "in_modes", to=[["i", 8]]), r"branches\[0\]: Label 'i' of core 'l.core0'"),
    "too many modes": (
        _set(*BRANCH, "in_modes", to=[["i", 1]] * 51),
        r"branches\[0\]\.in_modes: expected at most 50 entries, found 51",
    ),
    "too many labels": (_set(*CORE, "labels", to=["i"] * 17), r"cores\[0\]\.labels: expected at most 16 entries"),
    "too many cores": (_set(*BRANCH, "cores", to=[{}] * 65), r"branches\[0\]\.cores: expected at most 64 entries"),
    "too many branches": (_set("branches", to=[{}] * 65), "branches: expected at most 64 entries, found 65"),
    "no branches": (_set("branches", to=[]), "1 to 64 branches, found 0"),
    "label as number": (_set(*CORE, "labels", to=["i", 3]), r"cores\[0\]\.labels: expected str, found int"),
    "label too many": (
        _set(*CORE, "labels", to=["i", "r", "q"]),
        r"branches\[0\]\.cores\[0\]: Core 'l.core0': expected one axis per label",
    ),
    "absent tensor": (
        _set(*CORE, "tensor", to="l.core9"),
        r"branches\[0\]\.cores\[0\]\.tensor names the tensor 'l.core9', which the model folder does not have",
    ),
    "tensor as list": (_set(*CORE, "tensor", to=["l.core0"]), r"cores\[0\]\.tensor: expected str, found list"),
    "bias absent": (_set("bias", to="nowhere"), "bias names the tensor 'nowhere'"),
    "bias as boolean": (_set("bias", to=True), "bias: expected str, found bool"),
    "sparse as list": (_set("sparse", to=[]), "sparse: expected dict, found list"),
    "sparse incomplete": (_set("sparse", to={"rows": "r", "cols": "c"}), "sparse lacks 'values'"),
    "sparse of wrong tensors": (
        _set("sparse", to={"rows": "l.core0", "cols": "l.core0", "values": "l.bias"}),
        "sparse: Sparse tensor 'l.core0': expected a vector",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_description_is_refused(case: str) -> None:
    linear = build.low_rank("l", 4, 6, 2, bias=True)
    change, message = BROKEN[case]
    description = copy.deepcopy(to_json(linear))
    change(description)
    with pytest.raises(NetworkError, match=message) as caught:
        from_json("l", description, {tensor.name: tensor for tensor in linear.tensors()})
    assert "'l'" in str(caught.value)


@pytest.mark.parametrize("description", [None, [], "x", 3])
def test_description_of_another_type_is_refused(description: object) -> None:
    with pytest.raises(NetworkError, match="Linear 'l': the description: expected dict"):
        from_json("l", description, {})


def test_shape_of_the_file_is_what_counts() -> None:
    """A tensor whose header says another shape than the modes is caught, with the linear named."""
    linear = build.low_rank("l", 4, 6, 2)
    tensors = {tensor.name: tensor for tensor in linear.tensors()}
    tensors["l.core1"] = TensorRef("l.core1", (3, 6), "float32")
    with pytest.raises(NetworkError, match=r"Linear 'l': .*Label 'r' of core 'l.core1': expected size 2 .* found 3"):
        from_json("l", to_json(linear), tensors)
