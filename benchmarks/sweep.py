"""The paper's diagnostics on SmolLM2: MixT in the last N_B blocks, perplexity, questions, drift, transition.

python -m benchmarks.sweep [--n-tensors 4] [--blocks 0,1,2,4,8,15,30] [--calib-windows 32] [--refine-steps 0]

Resumable: rows are kept in benchmarks/results/tmp/.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.common import RESULTS, measured, mixt, publish, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-tensors", type=int, nargs="+", default=[4])
    parser.add_argument("--blocks", default="0,1,2,4,8,15,30")
    parser.add_argument("--calib-windows", type=int, default=32)
    parser.add_argument("--refine-steps", type=int, default=0)
    given = parser.parse_args()
    out = RESULTS / "tmp" / f"sweep-refine{given.refine_steps}"
    command = mixt(
        *("sweep", sample(), "-o", out, "--method", "mixt", "--blocks", given.blocks),
        *("--calib-windows", str(given.calib_windows), "--refine-steps", str(given.refine_steps), "--threads", "1"),
        *(word for number in given.n_tensors for word in ("--n-tensors", str(number))),
    )
    measured(command)
    data = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    publish(
        "sweep_smollm2" if given.refine_steps == 0 else f"sweep_smollm2_refine{given.refine_steps}",
        {
            "settings": data["settings"],
            "rows": [shortened(row) for row in data["rows"]],
            "transitions": [
                {key: rounded(found[key]) for key in ("variant", "figure", "clear", "location", "statement")}
                for found in data["transitions"]
            ],
        },
    )


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what its domains and layers sum up, rounded."""
    return {
        key: rounded(value) for key, value in row.items() if key not in ("texts", "drift_by_layer", "bytes", "params")
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
