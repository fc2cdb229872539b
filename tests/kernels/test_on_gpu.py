"""Compiled kernels on a GPU: the PTX that travels, launched as TensorRT would, against float64.

    python -m pytest -m gpu tests/kernels

Needs a CUDA GPU of compute capability 8.0 or later and a PyTorch that sees it. Left out of every other run, which says
so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mixt_export.building.kernels import Compiled, compile_kernels
from tests.kernels.launcher import Driver
from tests.kernels.linears import Case, mixture, train
from tests.kernels.test_interpreted import CASES, TOLERANCE

pytestmark = pytest.mark.gpu

#: Linears of real sizes, made when a test needs them.
LARGE: dict[str, Callable[[], Case]] = {
    "square": lambda: train("square", (64, 64), (64, 64), (16,), "float16", 512),
    "smollm2": lambda: train("smollm2", (24, 24), (32, 48), (32,), "float16", 512),
    "pairs": lambda: mixture("pairs", (512, 512), 2, (2, 2), None, True, "float16", 512),
}


def _case(name: str) -> tuple[Case, Any]:
    if name in CASES:
        return CASES[name]
    case = LARGE[name]()
    return case, case.linear.kernel()


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_a_kernel_on_the_gpu(name: str) -> None:
    """Right, twice in a row. How long kernels take: benchmarks/kernels_on_gpu.py."""
    import torch

    case, kernel = _case(name)
    (file,) = compile_kernels([kernel])
    assert isinstance(file, Compiled)
    how = case.linear.launch(kernel)
    arrays = [case.x, *case.matrices, *([] if case.bias is None else [case.bias])]
    tensors = [torch.from_numpy(array).cuda() for array in arrays]
    y = torch.full((len(case.x), case.dense.shape[1]), torch.nan, dtype=tensors[0].dtype, device="cuda")
    driver, stream = Driver(), torch.cuda.current_stream().cuda_stream
    function = driver.load(file.ptx, file.entry)
    grid = how.grid(len(case.x))

    def launch() -> None:
        pointers = [tensor.data_ptr() for tensor in tensors]
        numbers = [len(case.x), *how.numbers]
        driver.launch(function, grid, file.threads, file.shared, pointers, numbers, y.data_ptr(), stream)

    expected = case.expected()
    for _ in range(2):
        y.fill_(torch.nan)
        launch()
        found = y.cpu().numpy().astype(np.float64)
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < TOLERANCE
