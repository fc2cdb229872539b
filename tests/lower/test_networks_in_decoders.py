"""Every structure of the IR, inside a decoder: exported, run, and compared with the same model made dense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.network import FactorizedLinear, build, densify
from mixt_export.targets import export
from tests.ortrun import Graph, relative
from tests.tiny import write_tiny

UP = "model.layers.0.mlp.up_proj"  # 48 -> 104
STRUCTURES: dict[str, Callable[[], FactorizedLinear]] = {
    "low-rank": lambda: build.low_rank(UP, 48, 104, 6),
    "kronecker": lambda: build.kronecker(UP, (6, 8), (8, 13), 3),
    "tensor-train": lambda: build.tensor_train(UP, (4, 3, 4), (2, 4, 13), (5, 3)),
    "tensor-ring": lambda: build.tensor_ring(UP, (4, 3, 4), (2, 4, 13), (2, 3, 2)),
    "mixt": lambda: build.mixt(UP, 48, 104, 3),
    "mixt-padded": lambda: build.mixt(UP, 48, 104, 3, paper_padding=True),
    "tucker": lambda: build.tucker2(UP, 48, 104, 7, 9),
}


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_structure(tmp_path: Path, structure: str, target: str) -> None:
    base = write_tiny(tmp_path / "base", num_hidden_layers=2)
    linear = STRUCTURES[structure]()
    rng = np.random.default_rng(11)
    cores = {t.name: (rng.standard_normal(t.shape) / t.shape[-1] ** 0.5).astype(np.float32) for t in linear.tensors()}
    (tmp_path / "model").mkdir()
    new = [NewTensor(name, "float32", core.shape, lambda core=core: core) for name, core in cores.items()]
    write_checkpoint(tmp_path / "model", open_checkpoint(base), new, {UP: linear}, {})

    tensors = load_file(base / "model.safetensors")
    tensors[f"{UP}.weight"] = densify(linear, cores.__getitem__).astype(np.float32)
    save_file(tensors, base / "model.safetensors")

    export(tmp_path / "model", tmp_path / "out", target=target, verify=False)
    export(base, tmp_path / "dense", target=target, verify=False)
    ids = rng.integers(0, 300, (2, 9))
    found, expected = (Graph(tmp_path / name).run(ids)[0] for name in ("out", "dense"))
    assert relative(found, expected) < 1e-5
