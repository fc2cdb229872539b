"""Compressing encoders: the same commands, block by block, without a loss to measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import compress
from mixt_export.compression.encoder_blocks import BlockwiseEncoder
from mixt_export.compression.recover import recover
from mixt_export.compression.settings import Settings
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.reference import load_reference
from mixt_export.targets import export
from mixt_export.verification import VerifyOptions, verify
from tests.tiny_encoder import write_tiny_encoder

torch.set_num_threads(1)
SETTINGS = Settings(windows=4, window=32)


@pytest.fixture(scope="module", params=[("bert", False), ("roberta", True), ("distilbert", True)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, task = request.param
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder") / "model", kind, task=task)


def test_blocks_run_as_the_whole_model_does(model: Path) -> None:
    whole = load_reference(model)
    blocks = BlockwiseEncoder(open_checkpoint(model))
    ids = np.random.default_rng(0).integers(5, 300, (2, 9))
    hidden = blocks.embed(ids, np.zeros((2, 9, 48), np.float32))
    with torch.no_grad():
        for index in range(blocks.blocks):
            with blocks.block(index) as layer:
                hidden = blocks.run(layer, index, hidden)
        wanted = whole(input_ids=torch.from_numpy(ids)).last_hidden_state
    assert float((hidden - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd-llm", {"keep": 0.7}),
        ("tt", {"keep": 0.7, "cores": 2}),
        ("tucker", {"keep": 0.7}),
        ("mixt", {"n_tensors": 2, "refine_steps": 0}),
    ],
)
def test_compressed_encoders_export_and_pass(model: Path, tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    compress(model, tmp_path / "small", method=method, blocks="last:2", settings=SETTINGS, **options)
    small = open_checkpoint(tmp_path / "small")
    assert len(small.factors) == 12
    export(tmp_path / "small", tmp_path / "out", verify=False)
    quick = VerifyOptions(positions=40, memory=False, threads=1, write=False)
    report = verify(tmp_path / "out", tmp_path / "small", options=quick)
    assert report.passed, report.checks


def test_methods_that_need_a_loss_say_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="an encoder predicts no tokens"):
        compress(model, tmp_path / "small", method="gfw-svd", settings=SETTINGS)
    assert not (tmp_path / "small").exists()


def test_perplexity_is_for_decoders(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--eval-text: this model predicts no next tokens"):
        compress(model, tmp_path / "small", method="svd", eval_text=[model / "config.json"], settings=SETTINGS)
    assert not (tmp_path / "small").exists()


def test_recovery_is_for_decoders(model: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "small", method="svd", keep=0.7, blocks="last:1", settings=SETTINGS)
    with pytest.raises(UnsupportedError, match="is an encoder, which predicts no tokens; give a decoder"):
        recover(tmp_path / "small", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
