"""Compile every kernel of the catalogue, put it through the gates, and compare its text with the pinned digest.

python -m mixt_export.building.kernels             compile, gate, compare; exit code 3 when anything differs
python -m mixt_export.building.kernels --update    pin what was compiled now
python -m mixt_export.building.kernels --table     the table of docs/kernels.md, from the pinned figures
"""

from __future__ import annotations

import argparse
import sys

from mixt_export.building.kernels.catalogue import catalogue
from mixt_export.building.kernels.compile import Failed, compile_kernels, triton_version
from mixt_export.building.kernels.gates import inspect
from mixt_export.building.kernels.golden import differences, entry, read_golden, table, write_golden
from mixt_export.errors import MixtError


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every kernel passes and none changed, 3 otherwise, 6 without Triton."""
    parser = argparse.ArgumentParser(prog="python -m mixt_export.building.kernels", description=__doc__)
    parser.add_argument("--update", action="store_true", help="pin what was compiled now")
    parser.add_argument("--table", action="store_true", help="print the pinned figures as a table and compile nothing")
    options = parser.parse_args(arguments)
    if options.table:
        sys.stdout.write(table(read_golden()))
        return 0
    try:
        return _check(options.update)
    except MixtError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(error.exit_code)


def _check(update: bool) -> int:
    found, faults = {}, []
    for compiled in compile_kernels(catalogue()):
        name = compiled.kernel.name
        if isinstance(compiled, Failed):
            faults.append(f"{name}: does not compile: {compiled.reason}")
            continue
        inspection = inspect(compiled)
        found[name] = entry(compiled, inspection)
        faults += [f"{name}: {fault.gate}: {fault.reason}" for fault in inspection.faults]
    if update and not faults:
        write_golden(found)
    elif not update:
        faults += differences(read_golden(), found)
    for fault in faults:
        sys.stderr.write(f"{fault}\n")
    sys.stdout.write(f"{len(found)} kernels compiled by Triton {triton_version()}, {len(faults)} faults\n")
    return 3 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
