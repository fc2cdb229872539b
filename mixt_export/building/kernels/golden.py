"""The pinned kernels: digest and figures of each, so that a change of a kernel or of the compiler is seen."""

from __future__ import annotations

import json
from typing import Any

from mixt_export.building.kernels.compile import Compiled, triton_version
from mixt_export.building.kernels.gates import ASSEMBLERS, Inspection
from mixt_export.resources import resource

Entry = dict[str, Any]


def entry(compiled: Compiled, inspection: Inspection) -> Entry:
    """What is pinned of one kernel."""
    return {
        "sha256": compiled.sha256,
        "parameters": inspection.parameters,
        "threads": compiled.threads,
        "shared": compiled.shared,
        "registers": {f"sm_{capability}": usage.registers for capability, usage in inspection.usage.items()},
        "mma": inspection.mma,
        "cp_async": inspection.cp_async,
    }


def read_golden() -> dict[str, Any]:
    """The pinned kernels: ``triton`` (version that made them) and ``kernels`` (name -> `entry`)."""
    found: dict[str, Any] = json.loads(_path().read_text(encoding="utf-8"))
    return found


def write_golden(kernels: dict[str, Entry]) -> None:
    """Pin ``kernels`` (name -> `entry`)."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in kernels.items())
    text = f'{{\n "triton": {json.dumps(triton_version())},\n "kernels": {{\n{lines}\n }}\n}}\n'
    _path().write_text(text, encoding="utf-8")


def differences(golden: dict[str, Any], found: dict[str, Entry]) -> list[str]:
    """One sentence for each kernel in ``found`` that is not pinned, or not as pinned."""
    pinned, version = golden["kernels"], triton_version()
    if golden["triton"] != version:
        return [f"the pinned kernels are of Triton {golden['triton']}, installed is {version}; install that one."]
    return [
        f"{name}: is pinned as {str(pinned.get(name, {}).get('sha256'))[:12]}, compiled is {facts['sha256'][:12]}; "
        "update the pins if the change is intended."
        for name, facts in found.items()
        if pinned.get(name) != facts
    ]


def table(golden: dict[str, Any]) -> str:
    """The pinned figures as a Markdown table."""
    registers = [f"sm_{capability}" for capability in ASSEMBLERS]
    head = ["kernel", "threads", *(f"registers {name}" for name in registers), "shared bytes", "mma", "cp.async"]
    rows = [
        [f"`{name}`", str(facts["threads"]), *(str(facts["registers"][sm]) for sm in registers)]
        + [str(facts[key]) for key in ("shared", "mma", "cp_async")]
        for name, facts in golden["kernels"].items()
    ]
    lines = [head, ["-"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _path() -> Any:
    return resource("runtimes") / "tensorrt" / "kernels" / "golden.json"
