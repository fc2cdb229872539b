"""Run kernels in Triton's interpreter: python -m tests.kernels.interpret REQUESTS.npz RESULTS.npz (TRITON_INTERPRET=1).

The interpreter must be chosen before a kernel is imported, hence a process of its own. Executes the very source that is
compiled, on numpy arrays in place of device memory; it knows no races, no limits of a device and no launch.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np
import torch

from mixt_export.resources import resource


def run(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The kernel of ``case`` over memory that is full of NaN until it is written."""
    kernel = case["kernel"]
    function = getattr(importlib.import_module(f"kernels.{kernel['module']}"), kernel["function"])
    x, *matrices = (torch.from_numpy(arrays[name]) for name in case["inputs"])
    bias = matrices.pop() if kernel["bias"] else None
    y = torch.full((x.shape[0], case["out_features"]), torch.nan, dtype=x.dtype)
    given: dict[str, Any] = dict.fromkeys(case["absent"])
    pointers = [name for name in function.arg_names if name.endswith("_ptr") and name not in given]
    given |= dict(zip(pointers, [x, *matrices, *([bias] if kernel["bias"] else []), y], strict=True))
    constants = dict(kernel["constants"])
    numbers = [name for name in function.arg_names if name not in given and name not in constants]
    given |= dict(zip(numbers, [x.shape[0], *case["numbers"]], strict=True))
    function[tuple(case["grid"])](**given, **constants)
    return y.numpy()


def main() -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(resource("runtimes") / "tensorrt"))
    with np.load(sys.argv[1]) as file:
        arrays = {name: file[name] for name in file.files}
    cases = json.loads(str(arrays.pop("cases")))
    np.savez(sys.argv[2], **{case["name"]: run(case, arrays) for case in cases})


if __name__ == "__main__":
    main()
