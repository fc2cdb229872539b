"""The names of real bindings: how they were read, and that a script which uses another name is caught.

Every attribute that builder and runner touch is checked against TensorRT 10.3, 10.16 and 11.4 in tests/runtimes_trt:
the module they get there offers exactly those names and counts arguments.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.building.api.record import CLASSES, VERSIONS, arguments
from tests.runtimes_trt.fake_cuda import FakeCudart
from tests.runtimes_trt.fake_tensorrt import fake_tensorrt, names_of

DOC = """set_input_shape(*args, **kwargs)
Overloaded function.

1. set_input_shape(self: tensorrt_bindings.tensorrt.IExecutionContext, name: str, shape: tuple) -> bool

2. set_input_shape(self: tensorrt_bindings.tensorrt.IExecutionContext, name: str, shape: list[int] = []) -> bool
"""


def test_arguments_of_a_docstring() -> None:
    assert arguments(DOC) == [[2, 2], [1, 2]]
    assert arguments("create_network(self: x.Builder, flags: int = 0) -> x.INetworkDefinition\n") == [[0, 1]]
    assert arguments("reset(self: x.Builder) -> None") == [[0, 0]]
    assert arguments("int : the number of inputs") is None


@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_what_was_recorded(version: str) -> None:
    names = names_of(version)
    assert names["requirement"] == VERSIONS[version][0]
    assert set(names["classes"]) >= set(CLASSES) - {"EngineStat"}
    assert names["classes"]["IOptimizationProfile"]["set_shape"] == [[4, 4]]


def test_versions_differ_where_tensorrt_changed() -> None:
    old, middle, new = (names_of(version)["classes"] for version in ("10.3", "10.16", "11.4"))
    for classes in (old, middle, new):
        assert "STRONGLY_TYPED" in classes["NetworkDefinitionCreationFlag"] and "TF32" in classes["BuilderFlag"]
    assert "FP16" in old["BuilderFlag"] and "FP16" not in new["BuilderFlag"]
    assert "EXPLICIT_BATCH" in middle["NetworkDefinitionCreationFlag"]
    assert "EXPLICIT_BATCH" not in new["NetworkDefinitionCreationFlag"]
    # None of them can be told to build for another GPU: Orin's engine is built on Orin.
    assert not any("set_compute_capability" in classes["IBuilderConfig"] for classes in (old, middle, new))


def silent(module: Any) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        def log(self, severity: object, message: str) -> None: ...

    return Logger()


@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_the_fake_refuses_what_the_version_lacks(version: str) -> None:
    module = fake_tensorrt(version, FakeCudart())
    builder = module.Builder(silent(module))
    config = builder.create_builder_config()
    for touch in (
        lambda: config.set_compute_capability(0, 0),
        lambda: config.max_workspace_size,
        lambda: setattr(config, "max_workspace_size", 1),
        lambda: builder.build_engine(None, config),
    ):
        with pytest.raises(AttributeError, match=f"tensorrt {version}"):
            touch()
    with pytest.raises(TypeError, match="set_shape takes"):
        builder.create_optimization_profile().set_shape("x", (1,), (2,))
    with pytest.raises(AttributeError):
        module.ComputeCapability  # noqa: B018 - the access is the test
