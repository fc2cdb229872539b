"""Where weights come from: linked in place, packed when adjacent, streamed when converted; shapes are checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import CheckpointError, MixtError, UnsupportedError
from mixt_export.lower import DIALECTS
from mixt_export.lower.dialects import check_dialect
from mixt_export.lower.weights import STREAMED_FILE, Weights, write_streamed
from mixt_export.targets import export, plan_export
from tests.tiny import write_tiny, write_tiny_low_rank

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def test_factors_are_pointed_at_in_place(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    for target in ("ort", "onnx"):
        plan = plan_export(write_tiny_low_rank(tmp_path / f"model-{target}", base), target=target)
        assert [entry.name for entry in plan.lowered.weights.streamed] == ["/rotary/cos", "/rotary/sin"]


def test_streamed_weights_are_the_transposed_rows(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "model"))
    weights = Weights(checkpoint, "float16")
    tensor = weights.transposed([Q, K], "qk")
    write_streamed(weights, tmp_path)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    expected = np.concatenate([stored[Q], stored[K]]).T.astype(np.float16)
    data = np.fromfile(tmp_path / STREAMED_FILE, np.float16)
    assert tuple(tensor.shape) == expected.shape
    assert np.array_equal(data.reshape(expected.shape), expected)


def test_a_tensor_asked_for_twice_is_written_once(tmp_path: Path) -> None:
    weights = Weights(open_checkpoint(write_tiny(tmp_path / "model")), "float16")
    assert weights.tensor(Q) is weights.tensor(Q)
    assert len(weights.streamed) == 1 and weights.streamed_bytes >= weights.streamed[0].nbytes


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[K][1, 2] = 70000.0
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MixtError, match=r"k_proj.*65504.*wider dtype"):
        export(folder, tmp_path / "out", dtype="fp16", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensor", "shape", "text"),
    [
        ("model.embed_tokens.weight", (299, 48), r"embed_tokens.*\[299, 48\].*\[300, 48\]"),
        ("model.norm.weight", (47,), r"model.norm.weight.*\[47\].*\[48\]"),
        (Q, (64, 47), r"q_proj.*\[64, 47\].*\[64, 48\]"),
        (Q, None, r"q_proj.weight' is missing"),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    tmp_path: Path, tensor: str, shape: tuple[int, ...] | None, text: str
) -> None:
    folder = write_tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[tensor]
    if shape is not None:
        tensors[tensor] = np.ones(shape, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=text):
        plan_export(folder)


def test_the_dialect_check_names_a_foreign_node(tmp_path: Path) -> None:
    model = plan_export(write_tiny(tmp_path / "model")).lowered.model
    with pytest.raises(Exception, match=r"node '/model/layers.0/self_attn/.*com.microsoft::"):
        check_dialect(model, DIALECTS["portable"])
    next(iter(model.graph)).name = ""
    with pytest.raises(Exception, match="has no name"):
        check_dialect(model, DIALECTS["ort"])


def test_head_size_the_kernel_refuses(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", head_dim=12)
    with pytest.raises(UnsupportedError, match=r"head_dim 12 is not a multiple of 16.*--target onnx"):
        plan_export(folder, target="ort")
    plan_export(folder, target="onnx")
