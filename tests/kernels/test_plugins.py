"""The plugins, asked by NVIDIA's own plugin package of four versions of TensorRT over an imitated core."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixt_export.building.toolkit import toolkit
from tests.kernels.fake_core import WHEELS, launch, tensorrt_of

tactics, kernel_files, plugins, errors = (toolkit(name) for name in ("tactics", "kernel_files", "plugins", "errors"))
pytestmark = pytest.mark.network

TRAIN = tactics.Train((24, 32), (32, 48), (16,), "float16", True)
#: 96 -> 80 features as pairs of four terms, bond 2.
WINDOWS = [96, 80, 1, 40, 48, 4, 4, 20, 24, 1]
MIXTURE = tactics.Mixture(96, 80, (tactics.Window(1, 40, 48, 2), tactics.Window(2, 40, 48, 1)), True, "float16")


def write_index(folder: Path, kernels: list[Any], operators: list[str]) -> Any:
    """An index of ``kernels`` whose PTX is their name."""
    folder.mkdir(exist_ok=True)
    facts = {}
    for kernel in kernels:
        text = f"// {kernel.name}\n"
        (folder / f"{kernel.name}.ptx").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        facts[kernel.name] = {
            "file": f"{kernel.name}.ptx", "sha256": digest, "entry": f"mixt_{kernel.kind}",
            "threads": 32 * kernel.warps, "shared": 1024 * kernel.matrices,
        }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"schema": 1, "operators": operators, "kernels": facts}))
    return kernel_files.read_index(folder)


@pytest.fixture(params=WHEELS)
def core(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with tensorrt_of(request.param, tmp_path / "package") as module:
        yield module


def test_a_tensor_train_is_launched_as_its_kernels_say(core: Any, tmp_path: Path) -> None:
    index = write_index(tmp_path / "kernels", [TRAIN.kernel()], ["TTLinear2Bias"])
    assert plugins.register(core, index) == ("TTLinear2Bias",)
    shapes = [(1, 5, 768), (1, 32, 24, 16), (16, 48, 32, 1), (1536,)]
    found = launch(core, "TTLinear2Bias", shapes, "HALF", {}, (2, 5))
    assert found["output"] == (2, 5, 1536) and found["last_is_constant"]
    assert found["types"] == ["HALF"] and found["formats"] == {"LINEAR"}
    (asked,) = found["launches"].values()
    kernel, how = TRAIN.kernel(), TRAIN.launch(TRAIN.kernel())
    assert (asked["grid_x"], asked["grid_y"], asked["grid_z"]) == how.grid(10) == (1, 12, 10 * 2)
    assert (asked["block_x"], asked["block_y"], asked["shared_mem"]) == (128, 1, 2048)
    assert asked["numbers"] == [10, 24, 32, 32, 48, 16]
    assert len(asked["numbers"]) + 4 + 1 == kernel.parameters
    assert asked["entry"] == f"mixt_{kernel.kind}" and kernel.name in asked["ptx"]


def test_the_grid_of_few_tokens_ends_with_them(core: Any, tmp_path: Path) -> None:
    """TensorRT evaluates the expression for every number of tokens; a kernel's tiles for few begin there too."""
    assert TRAIN.kernel().constant("FEW") == MIXTURE.kernel().constant("FEW") == tactics.FEW == 16
    index = write_index(tmp_path / "kernels", [TRAIN.kernel()], ["TTLinear2Bias"])
    plugins.register(core, index)
    shapes = [(1, 5, 768), (1, 32, 24, 16), (16, 48, 32, 1), (1536,)]
    for tokens, z in ((1, 2), (7, 14), (16, 32), (17, 1), (18, 1), (700, 1), (100_000, 1)):
        (asked,) = launch(core, "TTLinear2Bias", shapes, "HALF", {}, (1, tokens))["launches"].values()
        assert (asked["grid_x"], asked["grid_z"]) == (-(-tokens // 64), z)
        assert TRAIN.launch(TRAIN.kernel()).grid(tokens) == (asked["grid_x"], asked["grid_y"], z)


def test_a_mixture_is_launched_as_its_windows_say(core: Any, tmp_path: Path) -> None:
    index = write_index(tmp_path / "kernels", [MIXTURE.kernel()], ["MixTLinear2Left"])
    plugins.register(core, index)
    fields = {"windows": [96, 80, 1, 40, 48, 2, 2, 40, 48, 1], "join": [80, -1], "aot": [1]}
    found = launch(core, "MixTLinear2Left", [(1, 3, 96), (40, 48), (40, 48)], "HALF", fields, (3, 7))
    assert found["output"] == (3, 7, 80)
    (asked,) = found["launches"].values()
    kernel, how = MIXTURE.kernel(), MIXTURE.launch(MIXTURE.kernel())
    assert (asked["grid_x"], asked["grid_y"], asked["grid_z"]) == how.grid(21) == (1, 2, 1)
    assert how.grid(16) == (1, 2, 4)
    assert asked["numbers"] == [21, 96, 80, 1, 40, 48, 2, 40, 48, 40]
    assert len(asked["numbers"]) + 3 + 1 == kernel.parameters


def test_only_what_was_compiled_is_offered(core: Any, tmp_path: Path) -> None:
    """The kernel of another linear passed the gates; and there are none for float32."""
    index = write_index(tmp_path / "kernels", [MIXTURE.kernel()], ["TTLinear2Bias"])
    plugins.register(core, index)
    shapes = [(1, 5, 768), (1, 32, 24, 16), (16, 48, 32, 1), (1536,)]
    assert not launch(core, "TTLinear2Bias", shapes, "HALF", {}, (1, 1))["launches"]


def test_every_operator_of_the_exporter_has_a_plugin(core: Any, tmp_path: Path) -> None:
    from mixt_export.resources import resource

    operators = [path.stem for path in (resource("graphs") / "ops").glob("*Linear*.onnxtxt")]
    operators = sorted(name for name in operators if not name.startswith(("LowRank", "Pivot")))
    index = write_index(tmp_path / "kernels", [], operators)
    assert plugins.register(core, index) == tuple(operators)
    names = {name for name, _, namespace in core.get_plugin_registry().creators if namespace == "mixt"}
    assert names == set(operators) and len(operators) == 32


def test_an_operator_without_a_plugin_is_one_sentence(core: Any, tmp_path: Path) -> None:
    index = write_index(tmp_path / "kernels", [], ["RingLinear3"])
    with pytest.raises(errors.TrtError, match=r"RingLinear3: these scripts have no plugin.*--no-kernels"):
        plugins.register(core, index)


def test_the_numbers_are_the_sizes() -> None:
    """Sizes differ from each other, so that none can stand for another."""
    linear = tactics.Train((3, 8), (5, 7), (11,), "float16")
    kernel = linear.candidate()
    assert linear.launch(kernel).numbers == (3, 8, 5, 7, 11)
    assert kernel.numbers == len(linear.launch(kernel).numbers) + 1
    assert prod(linear.in_modes) == 24


def test_a_linear_that_products_do_faster_has_no_kernel() -> None:
    """The bars are measured (docs/kernels.md): padding of a train, multiply-adds of a mixture."""
    windows = [(tactics.Window(1, size, size, 2), tactics.Window(2, size, size, 1)) for size in (1536, 2048)]
    small, large = (tactics.Mixture(2 * pair[0].rows, 2 * pair[0].rows, pair, True, "float16") for pair in windows)
    assert small.refusal() is None and small.kernel() == small.candidate()
    assert large.refusal() == (
        "its windows take 16.8 million multiply-adds a token, which products of their own do faster"
    )
    fits, padded = (
        tactics.Train((24, 24), (32, 48), (16,), "float16"),
        tactics.Train((24, 24), (33, 48), (9,), "float16"),
    )
    assert fits.waste(fits.candidate()) == pytest.approx(64 / 56) and fits.kernel() is not None
    assert padded.kernel() is None
    assert padded.refusal() == "the tiles execute 3.0 times the multiply-adds of modes (24, 24) x (33, 48)"


def test_the_folder_is_used_where_the_library_can(core: Any, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert plugins.use_kernels(core, folder) == ((), "no compiled kernels: every operator is built from standard ones")
    write_index(folder, [TRAIN.kernel()], ["TTLinear2Bias"])
    said = "compiled kernels execute TTLinear2Bias"
    assert plugins.use_kernels(core, folder) == (("TTLinear2Bias",), said)


def test_an_older_library_builds_the_bodies(tmp_path: Path) -> None:
    """10.3 has no plugin package; TensorRT-RTX has none that takes compiled kernels."""
    import tensorrt_rtx

    folder = tmp_path / "kernels"
    write_index(folder, [TRAIN.kernel()], ["TTLinear2Bias"])
    said = (
        "compiled kernels are left out, which TensorRT 10.9 and later can launch: every operator is built from "
        "standard ones"
    )
    for module in (SimpleNamespace(__name__="tensorrt"), tensorrt_rtx):
        assert plugins.use_kernels(module, folder) == ((), said)
