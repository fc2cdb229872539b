"""Parity of exports of SmolLM2 with PyTorch float32: `mixt verify --thorough`, dense and low rank, float32 and float16.

python -m benchmarks.parity
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import mixt, publish, sample


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        low_rank = folder / "low-rank"
        command = mixt("compress", sample(), "-o", low_rank, "--keep", "0.9")
        subprocess.run(command, check=True, capture_output=True)
        cases = {
            "dense ort fp32": (sample(), "ort", "fp32"),
            "dense onnx fp32": (sample(), "onnx", "fp32"),
            "low rank ort fp32": (low_rank, "ort", "fp32"),
            "low rank ort fp16": (low_rank, "ort", "fp16"),
        }
        publish("parity", {name: case(folder / name.replace(" ", "-"), *given) for name, given in cases.items()})


def case(out: Path, model: Path, target: str, dtype: str) -> dict[str, Any]:
    export = mixt("export", model, "-o", out, "--target", target, "--dtype", dtype, "--no-verify")
    subprocess.run(export, check=True, capture_output=True)
    verify = mixt("verify", out, "--reference", model, "--thorough", "--no-memory")
    subprocess.run(verify, check=False, capture_output=True)
    report = json.loads((out / "report.json").read_text())
    return {
        "passed": report["passed"],
        "minimum tolerance": report["minimum_tolerance"],
        **{check["name"]: check["metrics"] for check in report["checks"]},
    }


if __name__ == "__main__":
    main()
