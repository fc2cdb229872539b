"""All benchmarks, one after the other. Takes about two hours on two cores.

python -m benchmarks.run
"""

from __future__ import annotations

import subprocess
import sys

ALL = (
    "export_cost",
    "low_rank_linear",
    "mixt_linear",
    "mixt_memory",
    "speed",
    "parity",
    "quality",
    "tensor_train",
    "recovery",
    "sweep",
    "encoder",
    "trt_build",
)


def main() -> None:
    for name in ALL:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
