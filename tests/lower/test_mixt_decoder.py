"""A decoder with MixT linears: every form, both dialects, against PyTorch executing the model folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixt_export import load_reference
from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import UsageError
from mixt_export.targets import export
from tests.ortrun import Graph, relative
from tests.tiny import write_tiny, write_tiny_mixt

TERMS = {"q_proj": 4, "k_proj": 3, "v_proj": 2, "o_proj": 2, "gate_proj": 4, "up_proj": 3, "down_proj": 4}
FORMS = {
    "chosen": [],
    "branches": [(".", "branches")],
    "dense": [(".", "dense")],
    "left": [(".", "branches-left"), ("gate|down", "pairs-left")],  # exact networks only
    "merged": [("q_proj|down", "pairs"), ("gate", "merged:1+3"), ("k_proj|up", "merged:1+2")],
}


@pytest.fixture(scope="module", params=["qwen2", "llama-padded"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray, np.ndarray]:
    """The folder, token ids (2, 9), and PyTorch's logits of the last position."""
    folder = tmp_path_factory.mktemp("mixt")
    family, _, padded = request.param.partition("-")
    base = write_tiny(folder / "base", family, num_hidden_layers=2)
    options = {"bond": 3, "paper_padding": True} if padded else {}
    write_tiny_mixt(folder / "model", base, TERMS, **options)
    ids = np.random.default_rng(12).integers(0, 300, (2, 9))
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = load_reference(folder / "model")(torch.from_numpy(ids)).logits[:, -1].double().numpy()
    return folder / "model", ids, logits


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("form", FORMS)
def test_parity(model: tuple, tmp_path: Path, form: str, target: str) -> None:
    folder, ids, expected = model
    if form == "left" and open_checkpoint(folder).config["model_type"] == "llama":
        with pytest.raises(UsageError, match="has no such form"):
            export(folder, tmp_path / "out", target=target, forms=FORMS[form], verify=False)
        return
    result = export(folder, tmp_path / "out", target=target, forms=FORMS[form], verify=False)
    graph = Graph(tmp_path / "out")
    assert relative(graph.run(ids)[0], expected) < 1e-5
    head, past = graph.run(ids[:, :6])
    for position in range(6, 9):
        head, past = graph.run(ids[:, position : position + 1], past)
    assert relative(head, expected) < 1e-5
    assert result.manifest["memory"]["weight_bytes"] == result.plan.weight_bytes
