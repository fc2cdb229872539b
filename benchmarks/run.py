"""All benchmarks, one after the other. Takes several hours on two cores.

python -m benchmarks.run
"""

from __future__ import annotations

import subprocess
import sys

ALL = (
    "attention",
    "decode_step",
    "export_cost",
    "faults",
    "fuzz",
    "int8_cache",
    "killed",
    "low_rank_data",
    "low_rank_linear",
    "low_rank_objectives",
    "mixt_linear",
    "mixt_memory",
    "mixt_structure",
    "moe",
    "pivot",
    "planner",
    "speed",
    "parity",
    "quality",
    "low_rank_methods",
    "tensor_train",
    "threads",
    "tucker",
    "quantisation",
    "recovery",
    "recovery_recipe",
    "sweep",
    "encoder",
    "encoder_methods",
    "jetson_times",
    "trt_build",
    "trt_numerics",
    "trt_whole",
)


def main() -> None:
    for name in ALL:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
