"""The process that compiles: one JSON line per kernel in, one JSON line out.

    python -m mixt_export.building.kernels.worker FOLDER

``FOLDER`` holds the package ``kernels`` of Triton sources; the environment is that of compile.environment.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

#: What is compiled for: every GPU from Ampere on assembles it.
COMPUTE_CAPABILITY = 80
PTX_VERSION = 80
_POINTERS = {"float16": "*fp16", "float32": "*fp32"}


def compile_one(request: dict[str, Any]) -> dict[str, Any]:
    """PTX, entry, shared memory (bytes) and threads of one kernel; ``request`` is a tactics.Kernel as a dictionary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"kernels.{request['module']}"), request["function"])
    constants, divisible = dict(request["constants"]), dict(request["divisible"])
    absent = set(request["absent"])
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            constexprs[(position,)] = constants.get(name)
            continue
        pointer = name.endswith("_ptr")
        signature[name] = _POINTERS[request["dtype"]] if pointer else "i32"
        multiple = 16 if pointer else divisible.get(name, 1)
        if multiple > 1:  # without it every load is scalar and asynchronous copies are gone
            attributes[(position,)] = [["tt.divisibility", multiple]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": request["warps"], "num_stages": request["stages"], "ptx_version": PTX_VERSION}
    compiled = triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, 32), options=options)
    return {
        "ptx": compiled.asm["ptx"],
        "entry": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "threads": 32 * request["warps"],
    }


def main() -> None:
    """Serve requests from stdin until it ends."""
    sys.path.insert(0, sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr  # Triton prints what its assembler says
    for line in sys.stdin:
        try:
            answer = compile_one(json.loads(line))
        except Exception as error:
            while error.__cause__ is not None:  # outside is the place in the source, inside the reason
                error = error.__cause__  # type: ignore[assignment]
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
