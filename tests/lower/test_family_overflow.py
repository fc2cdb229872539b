"""Range of float16 in families beyond Llama's kin: the scan sees their attention, islands keep them finite."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixt_export.checkpoints import open_checkpoint
from mixt_export.families import decoder_of
from mixt_export.reference import load_reference
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification.graph import open_graph
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.overflow import scan
from mixt_export.verification.session import ExportedRunner
from mixt_export.verification.tokens import make_sequences, open_tokenizer
from mixt_export.verification.torch_model import TorchModel
from tests.lower.test_trt_overflow import scaled
from tests.ortrun import relative
from tests.tiny import write_tiny

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2", "gemma3_text"])
def test_the_scan_runs_the_model_as_it_is(tmp_path: Path, family: str) -> None:
    """Softcaps and windows included: block outputs have the maxima of a run without the scan's attention."""
    folder = write_tiny(tmp_path / "model", family)
    checkpoint = open_checkpoint(folder)
    seen = scan(checkpoint, decoder_of(checkpoint.config), max_length=64)
    model = TorchModel(folder, threads=1)
    made = make_sequences(open_tokenizer(folder), model.vocab_size, 64, VerifyOptions(positions=64))
    runs = [model.hidden(tokens)[1] for tokens in (*made.windows, *made.prompts)]
    expected = [max(float(np.abs(run[block]).max()) for run in runs) for block in range(3)]
    assert seen.residual[1:] == pytest.approx(expected, rel=1e-5)
    assert all(peak > 0.0 for series in (seen.scores, seen.keys, seen.values) for peak in series)


#: name -> family, factors on tensors, what the manifest must name, whether the stream becomes float32.
RESCUED = {
    "scores of gptj": ("gptj", {"h.1.attn.q_proj.weight": 200.0, "h.1.attn.k_proj.weight": 200.0}, 1, False),
    "hidden of gpt2": (
        "gpt2",
        {"h.1.mlp.c_fc.weight": 3e4, "h.1.mlp.c_proj.weight": 1e-4},
        "transformer.h.1.mlp.c_proj",
        True,
    ),
    "before a sandwich norm": ("gemma2", {"0.mlp.down_proj.weight": 3e4}, "model.layers.0.mlp.down_proj", False),
}


@pytest.mark.parametrize("case", RESCUED)
def test_a_model_built_to_overflow_is_rescued(tmp_path: Path, case: str) -> None:
    family, factors, wanted, stream = RESCUED[case]
    folder = scaled(write_tiny(tmp_path / "model", family), factors)
    ids = np.random.default_rng(3).integers(0, 300, 24)
    with torch.no_grad():
        expected = load_reference(folder)(torch.tensor(ids[None])).logits[0, -1].numpy()

    def error(name: str, scanned: bool) -> float:
        trt = TrtOptions(jetpack=6, scan=scanned)
        export(folder, tmp_path / name, target="trt", dtype="fp16", verify=False, trt=trt)
        with np.errstate(all="ignore"):
            return relative(ExportedRunner(open_graph(tmp_path / name), 1).full(ids).logits[0, -1], expected)

    assert not error("naive", False) < 0.2, "it does not overflow without islands; the test says nothing"
    assert error("rescued", True) < 2e-2
    said = json.loads((tmp_path / "rescued" / "mixt_manifest.json").read_text())["trt"]["islands"]
    assert wanted in (said["attention"] if isinstance(wanted, int) else said["linears"])
    assert said["residual"] is stream
