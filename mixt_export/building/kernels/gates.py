"""What a compiled kernel must be before it may travel: each gate names what is wrong, with the number it found.

The assembler is the one that Triton carries, so that no CUDA toolkit is needed. It says what a kernel costs on a
device; nothing is executed.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mixt_export.building.kernels.compile import Compiled
from mixt_export.errors import MissingDependencyError

#: Dynamic shared memory that a launch may ask for without raising a limit first; whether TensorRT raises it is unknown.
MAX_SHARED = 49152
MAX_REGISTERS = 255
#: Bytes a thread may spill: the assembler puts a number or two aside, outside loops, to fit one more block on a core.
MAX_SPILLED = 32
#: Loads of single 16-bit numbers; a bias and ends of rows may need some, a loop over unaligned rows has many more.
MAX_SCALAR_LOADS = 8

#: compute capability -> Triton's assembler that knows it: Orin, Thor.
ASSEMBLERS = {87: "ptxas", 110: "ptxas-blackwell"}

_ENTRY = re.compile(r"\.visible \.entry [\w$]+\((?P<parameters>[^)]*)\)")
_TARGET = ".version 8.0\n.target sm_80\n"
_PATH = re.compile(r"(?:^|[\s\"'])(/(?:[\w.-]+/)+[\w.-]+)")


@dataclass(frozen=True)
class Fault:
    """A gate that a kernel does not pass, and why."""

    gate: str
    reason: str


@dataclass(frozen=True)
class Usage:
    """What the assembler reports for one compute capability; spills in bytes."""

    registers: int
    spilled: int


@dataclass(frozen=True)
class Inspection:
    """Counts of a kernel's PTX, its usage per compute capability, and the gates it fails (none: it may travel)."""

    mma: int
    cp_async: int
    scalar_loads: int
    parameters: int
    usage: dict[int, Usage]
    faults: tuple[Fault, ...] = field(default=())


def inspect(compiled: Compiled) -> Inspection:
    """Assemble ``compiled`` for all of ASSEMBLERS and look at it. Raises MissingDependencyError without Triton."""
    usage, faults = {}, []
    for capability, tool in ASSEMBLERS.items():
        found = assemble(compiled.ptx, capability, tool)
        if isinstance(found, Fault):
            faults.append(found)
        else:
            usage[capability] = found
    entry = _ENTRY.search(compiled.ptx)
    inspection = Inspection(
        mma=compiled.ptx.count("mma.sync"),
        cp_async=len(re.findall(r"cp\.async\.c[ag]", compiled.ptx)),
        scalar_loads=len(re.findall(r"ld\.global\.[^;]*b16\b", compiled.ptx)),
        parameters=0 if entry is None else entry["parameters"].count(".param"),
        usage=usage,
    )
    faults += [Fault(name, reason) for name, gate in GATES.items() if (reason := gate(compiled, inspection))]
    return Inspection(**{**vars(inspection), "faults": tuple(faults)})


def assemble(ptx: str, capability: int, tool: str) -> Usage | Fault:
    """What Triton's assembler ``tool`` says of ``ptx`` for ``capability`` (87 for sm_87)."""
    with tempfile.TemporaryDirectory(prefix="mixt-ptx-") as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [str(_tool(tool)), "-v", f"-arch=sm_{capability}", str(source), "-o", str(source) + ".cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - Triton's own tool
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    if done.returncode or registers is None:
        said = next(
            (line for line in (done.stderr + done.stdout).splitlines() if "error" in line or "fatal" in line), ""
        )
        return Fault("assembles", f"the assembler refuses it for sm_{capability}: {said.strip()[:200]}")
    return Usage(int(registers[1]), sum(map(int, spills)))


def _tool(name: str) -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "assembling kernels needs the Python package 'triton', which is not installed: "
            "pip install 'mixt-export[kernels]'."
        )
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def _spills(_compiled: Compiled, found: Inspection) -> str | None:
    over = {capability: usage.spilled for capability, usage in found.usage.items() if usage.spilled > MAX_SPILLED}
    return f"registers spill: {_listed(over, 'bytes')}" if over else None


def _registers(_compiled: Compiled, found: Inspection) -> str | None:
    over = {capability: usage.registers for capability, usage in found.usage.items() if usage.registers > MAX_REGISTERS}
    return f"more than {MAX_REGISTERS} registers: {_listed(over, 'registers')}" if over else None


def _shared(compiled: Compiled, _found: Inspection) -> str | None:
    return f"{compiled.shared} bytes of shared memory, at most {MAX_SHARED}" if compiled.shared > MAX_SHARED else None


def _tensor_cores(compiled: Compiled, found: Inspection) -> str | None:
    wanted = compiled.kernel.dtype == "float16" and not found.mma
    return "float16 products do not run on Tensor Cores (no mma.sync)" if wanted else None


def _asynchronous(compiled: Compiled, found: Inspection) -> str | None:
    wanted = compiled.kernel.dtype == "float16" and not found.cp_async
    return "loads are not asynchronous (no cp.async): is an argument's divisibility missing?" if wanted else None


def _vectorised(compiled: Compiled, found: Inspection) -> str | None:
    many = found.scalar_loads > MAX_SCALAR_LOADS and not compiled.kernel.odd
    return f"{found.scalar_loads} loads of single 16-bit numbers" if many else None


def _parameters(compiled: Compiled, found: Inspection) -> str | None:
    wanted = compiled.kernel.parameters
    if found.parameters == wanted:
        return None
    return f"{found.parameters} parameters, a plugin passes {wanted} (inputs, numbers, output)"


def _portable(compiled: Compiled, _found: Inspection) -> str | None:
    return None if _TARGET in compiled.ptx else "it is not PTX 8.0 for sm_80, which every GPU from Ampere on takes"


def _no_path(compiled: Compiled, _found: Inspection) -> str | None:
    found = _PATH.search(compiled.ptx)
    return f"it holds a path of the machine that compiled it: {found[1]}" if found else None


def _listed(numbers: dict[int, int], unit: str) -> str:
    return ", ".join(f"{number} {unit} on sm_{capability}" for capability, number in numbers.items())


#: Name -> what is wrong, None when all is well.
GATES: dict[str, Callable[[Compiled, Inspection], str | None]] = {
    "spills": _spills,
    "registers": _registers,
    "shared": _shared,
    "mma": _tensor_cores,
    "cp.async": _asynchronous,
    "vectorised": _vectorised,
    "parameters": _parameters,
    "portable": _portable,
    "path": _no_path,
}
