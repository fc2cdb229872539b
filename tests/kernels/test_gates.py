"""Compiling ahead of time: pinned kernels come out as pinned, and every gate stops a kernel that is bad in its way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mixt_export.building.kernels import Compiled, Failed, compile_kernels, inspect
from mixt_export.building.kernels import compile as compiling
from mixt_export.building.kernels.catalogue import catalogue
from mixt_export.building.kernels.compile import strip_hidden
from mixt_export.building.kernels.gates import GATES, Inspection, Usage
from mixt_export.building.kernels.golden import differences, entry, read_golden, table
from mixt_export.errors import MissingDependencyError
from mixt_export.runtime import toolkit

tactics = toolkit("tactics")

#: One of each source is compiled here; `make kernels` compiles all of them.
PINNED = ("tt2-r16-k32-j32-a8", "mixt-c4_1-a4-bias")
GOOD = tactics.train_kernel(16, 32, wide=False, bias=False, align=8, odd=False)


def changed(kernel: Any, **constants: int) -> Any:
    return replace(kernel, constants=tuple((dict(kernel.constants) | constants).items()))


#: Kernels that compile and must not travel: far too large a tile, and one that the compiler knows nothing about.
BAD = {
    "large": replace(changed(GOOD, RP1=32, BM=128, BJ1=64, BK=64), stages=5),
    "unaligned": replace(GOOD, divisible=()),
    "refused": changed(GOOD, BK=12),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled | Failed]:
    """The pinned and the bad ones, by one process."""
    pinned = [kernel for kernel in catalogue() if kernel.name in PINNED]
    results = list(compile_kernels([*pinned, *BAD.values()]))
    return dict(zip([*(kernel.name for kernel in pinned), *BAD], results, strict=True))


@pytest.fixture(scope="module")
def good(compiled: dict[str, Any]) -> tuple[Compiled, Inspection]:
    return compiled["tt2-r16-k32-j32-a8"], inspect(compiled["tt2-r16-k32-j32-a8"])


def test_the_catalogue_is_pinned() -> None:
    names = [kernel.name for kernel in catalogue()]
    assert names == list(read_golden()["kernels"]) and len(names) == len(set(names))


def test_pinned_kernels_compile_to_the_pinned_text_and_pass(compiled: dict[str, Any]) -> None:
    found = {}
    for name in PINNED:
        inspection = inspect(compiled[name])
        assert inspection.faults == ()
        found[name] = entry(compiled[name], inspection)
    assert differences(read_golden(), found) == []


def test_a_change_is_seen(compiled: dict[str, Any], good: tuple[Compiled, Inspection]) -> None:
    kernel = replace(good[0], ptx=good[0].ptx.replace("add.s32", "sub.s32", 1))
    (said,) = differences(read_golden(), {kernel.kernel.name: entry(kernel, good[1])})
    assert said.startswith("tt2-r16-k32-j32-a8: is pinned as") and said.endswith("if the change is intended.")


def test_a_compiled_kernel_has_the_parameters_of_a_plugin_and_no_path(good: tuple[Compiled, Inspection]) -> None:
    kernel, found = good
    assert found.parameters == kernel.kernel.parameters == 3 + 6 + 1
    assert kernel.entry == "mixt_tt2_r16_k32_j32_a8" and f".entry {kernel.entry}(" in kernel.ptx
    assert "/" not in kernel.ptx and "tt2_param" not in kernel.ptx.replace(f"{kernel.entry}_param", "")
    assert found.mma and found.cp_async and set(found.usage) == {87, 110}


@pytest.mark.parametrize(
    ("kernel", "gate", "said"),
    [
        ("large", "spills", r"registers spill: \d+ bytes on sm_87, \d+ bytes on sm_110"),
        ("large", "shared", r"\d{5} bytes of shared memory, at most 49152"),
        ("unaligned", "cp.async", "is an argument's divisibility missing"),
        ("unaligned", "vectorised", r"\d+ loads of single 16-bit numbers"),
    ],
)
def test_a_gate_stops_a_bad_kernel(compiled: dict[str, Any], kernel: str, gate: str, said: str) -> None:
    import re

    faults = {fault.gate: fault.reason for fault in inspect(compiled[kernel]).faults}
    assert re.search(said, faults[gate])


def test_a_kernel_that_does_not_compile_is_a_value(compiled: dict[str, Any]) -> None:
    failed = compiled["refused"]
    assert isinstance(failed, Failed) and "power of 2" in failed.reason


CHANGES = {
    "mma": (lambda kernel: replace(kernel, ptx=kernel.ptx.replace("mma.sync", "mul")), "do not run on Tensor Cores"),
    "parameters": (
        lambda kernel: replace(kernel, kernel=replace(kernel.kernel, numbers=7)), r"10 parameters, a plugin passes 11",
    ),
    "portable": (lambda kernel: replace(kernel, ptx=kernel.ptx.replace("sm_80", "sm_90a")), "not PTX 8.0 for sm_80"),
    "assembles": (lambda kernel: replace(kernel, ptx=kernel.ptx.replace("ret;", "end;")), "the assembler refuses it"),
    "path": (
        lambda kernel: replace(kernel, ptx=kernel.ptx + '.file 1 "/home/me/kernels/tt.py"\n'), "/home/me/kernels/tt.py",
    ),
}  # fmt: skip


@pytest.mark.parametrize("gate", CHANGES)
def test_a_gate_stops_a_changed_kernel(good: tuple[Compiled, Inspection], gate: str) -> None:
    import re

    change, said = CHANGES[gate]
    faults = {fault.gate: fault.reason for fault in inspect(change(good[0])).faults}
    assert re.search(said, faults[gate])


def test_too_many_registers(good: tuple[Compiled, Inspection]) -> None:
    """No device has more than 255, so an assembler spills instead: the gate is for one that does not."""
    usage = {87: Usage(255, 0), 110: Usage(256, 0)}
    assert (
        GATES["registers"](good[0], replace(good[1], usage=usage)) == "more than 255 registers: 256 registers on sm_110"
    )


def test_every_gate_was_seen_to_fail() -> None:
    seen = {"spills", "shared", "cp.async", "vectorised", "registers", *CHANGES}
    assert set(GATES) | {"assembles"} == seen


_POINTER = "\t.param .u64 .ptr .global"
_ENTRY = f".visible .entry k(\n{_POINTER} k_param_0,\n{_POINTER} k_param_1,\n{{last}} k_param_2\n)"


def test_hidden_parameters() -> None:
    text = _ENTRY.format(last=_POINTER) + "{ ld.param.u64 %rd1, [k_param_0]; ret; }"
    assert strip_hidden(text).count(".param") == 2  # the declaration that is left, and its use
    with pytest.raises(ValueError, match="scratch memory"):
        strip_hidden(text.replace("[k_param_0]", "[k_param_2]"))
    with pytest.raises(ValueError, match="not Triton's scratch pointers"):
        strip_hidden(_ENTRY.format(last=".param .u32") + "{ ret; }")
    with pytest.raises(ValueError, match="no entry"):
        strip_hidden("")


def test_without_triton_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "triton_version", lambda: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mixt-export\[kernels\]'"):
        next(compile_kernels([GOOD]))


def test_the_table_has_a_line_for_each_kernel() -> None:
    lines = table(read_golden()).splitlines()
    assert len(lines) == 2 + len(read_golden()["kernels"]) and lines[0].startswith(
        "| kernel | threads | registers sm_87 |"
    )
