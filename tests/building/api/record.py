"""Record what TensorRT's Python bindings offer, per version, into the JSON files beside this script.

    python tests/building/api/record.py

The bindings are real wheels on PyPI, TensorRT itself is not there. A do-nothing libnvinfer with the nine functions that
the bindings import is enough to load them and to read the names of classes, methods and enumerators; nothing of
TensorRT runs. Needs pip, a C compiler and Python 3.11 on x86-64 Linux.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

#: version in the file name -> requirement on PyPI, major version of the libraries it loads
VERSIONS = {
    "10.3": ("tensorrt-cu12-bindings==10.3.0", 10),
    "10.16": ("tensorrt-cu13-bindings==10.16.1.11", 10),
    "11.4": ("tensorrt-cu13-bindings==11.4.0.106", 11),
}
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
FUNCTIONS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
#: Everything a builder or a runner can touch.
CLASSES = (
    *("Builder", "BuilderFlag", "DataType", "EngineStat", "ExecutionContextAllocationStrategy"),
    *("HardwareCompatibilityLevel", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer"),
    *("ILogger", "INetworkDefinition"),
    *("IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache", "MemoryPoolType"),
    *("NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserFlag", "ParserError", "ProfilingVerbosity", "Runtime"),
    *("TensorIOMode",),
)  # fmt: skip

_READ = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("tensorrt", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
names = {"module": sorted(name for name in dir(module) if not name.startswith("_"))}
for owner in json.loads(sys.argv[2]):
    kind = getattr(module, owner, None)
    if kind is not None:
        names[owner] = {n: (getattr(kind, n).__doc__ or "") if callable(getattr(kind, n)) else ""
                        for n in sorted(dir(kind)) if not n.startswith("_")}
print(json.dumps(names))
"""

#: "1. name(self: T, a: int, b: int = 0) -> None" in the docstring that pybind11 writes
_SIGNATURE = re.compile(r"^\s*(?:\d+\. )?\w+\((self: [^)]*)\)", re.MULTILINE)


def arguments(docstring: str) -> list[list[int]] | None:
    """[least, most] positional arguments without self of each overload; None for what is no method."""
    found = []
    for signature in _SIGNATURE.findall(re.sub(r"<[^>]*>|\[[^\]]*\]|\(\s*\)", "", docstring)):
        given = [part for part in signature.split(", ")[1:] if not part.startswith("*")]
        found.append([sum(" = " not in part for part in given), len(given)])
    return found or None


def record(version: str, scratch: Path) -> dict[str, object]:
    """Names of one version: module, and per class {name: arguments of its overloads, or null}."""
    requirement, major = VERSIONS[version]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement, "-d", str(scratch)]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(scratch)
    (scratch / "stub.c").write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        output = f"{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{output}", "-o", output, "stub.c"]
        subprocess.run(command, check=True, cwd=scratch)
    (extension,) = scratch.glob("*/tensorrt.so")
    raw = subprocess.run(
        [sys.executable, "-c", _READ, str(extension), json.dumps(CLASSES)],
        env={**os.environ, "LD_LIBRARY_PATH": str(scratch)},
        capture_output=True,
        text=True,
        check=True,
    )
    names = json.loads(raw.stdout)
    kinds = {owner: {n: arguments(d) for n, d in found.items()} for owner, found in names.items() if owner != "module"}
    return {"requirement": requirement, "module": names["module"], "classes": kinds}


def main() -> None:
    """Record every version."""
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as scratch:
            names = record(version, Path(scratch))
        classes = names.pop("classes")
        assert isinstance(classes, dict)
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in names.items()]
        kinds = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in classes.items()]
        text = "{\n" + ",\n".join(lines) + ',\n "classes": {\n' + ",\n".join(kinds) + "\n }\n}\n"
        (HERE / f"tensorrt-{version}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
