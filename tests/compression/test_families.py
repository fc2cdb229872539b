"""Every family beyond Llama's kin can be compressed, and what is compressed is what its dense twin computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import Settings, compress
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.recover import RecoverSettings, recover
from mixt_export.families import decoder_of
from mixt_export.network import densify
from mixt_export.reference import load_reference
from tests.compression.test_recover import write_texts
from tests.lower.matrix import logits_of
from tests.ortrun import relative
from tests.tiny import write_tiny, write_tiny_low_rank

torch.set_num_threads(1)

FAMILIES = ["gpt2", "gptj", "gemma2", "gemma3_text", "granite", "olmo2", "phi3", "smollm3", "starcoder2"]
SMALL = Settings(windows=4, window=24, fisher_windows=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_whole_model(tmp_path: Path, family: str) -> None:
    """Embeddings, positions, softcaps, scales, windows: the blocks in turn give what transformers gives."""
    folder = write_tiny(tmp_path / "model", family)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = BlockwiseModel(open_checkpoint(folder))
    tokens = np.random.default_rng(3).integers(0, 256, (2, 19))
    for _ in range(2):  # parts that were released are there again
        hidden = model.embed(tokens, np.zeros((2, 19, model.hidden), np.float32))
        with torch.no_grad():
            for index in range(model.blocks):
                with model.block(index) as block:
                    hidden = model.run(block, index, hidden)
            with model.head() as head:
                logits = np.stack([head(rows).numpy() for rows in hidden])
        expected = np.stack([logits_of(whole, row) for row in tokens])
        assert relative(logits, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_wiring_is_offered(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "model", family))
    model = BlockwiseModel(checkpoint)
    wired = {linear.name: linear for block in decoder_of(checkpoint.config).blocks for linear in block.linears}
    assert set(model.linears()) == set(wired)
    for name, linear in wired.items():
        assert model.linear_shape(name) == (linear.out_features, linear.in_features)


def test_svd_of_weights_stored_in_out(tmp_path: Path) -> None:
    """Of GPT-2's Conv1D: the factors are numpy's truncated SVD of the matrix, the right way round."""
    folder = write_tiny(tmp_path / "model", "gpt2")
    compress(folder, tmp_path / "out", method="svd", keep=0.6)
    made, dense = open_checkpoint(tmp_path / "out"), load_file(folder / "model.safetensors")
    assert made.factors
    for name, linear in made.factors.items():
        left, sizes, right = np.linalg.svd(dense[f"{name}.weight"].T.astype(np.float64), full_matrices=False)
        rank = linear.branches[0].cores[0].tensor.shape[1]
        product = densify(linear, lambda tensor: made.store.read(tensor, "float32"))
        assert relative(product, (left[:, :rank] * sizes[:rank]) @ right[:rank]) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_folders_run(tmp_path: Path, text: Path, family: str) -> None:
    folder = write_tiny(tmp_path / "model", family)
    compress(folder, tmp_path / "out", method="svd-llm", keep=0.95, calib=[text], settings=SMALL)
    ids = np.random.default_rng(1).integers(0, 256, 20)
    dense, made = (logits_of(load_reference(path), ids) for path in (folder, tmp_path / "out"))
    assert open_checkpoint(tmp_path / "out").factors
    assert 1e-4 < relative(made, dense) < 1.4  # what has nothing to do with each other is sqrt(2) apart


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2"])
def test_recovery_brings_the_student_closer(tmp_path: Path, family: str) -> None:
    """Heads with a bias, softcapped logits, weights stored (in, out): what the teacher says is what it computes."""
    dense = write_tiny(tmp_path / "dense", family)
    student = write_tiny_low_rank(tmp_path / "student", dense, 6, include=lambda name: ".2." in name)
    settings = RecoverSettings(
        steps=9, batch=2, window=24, windows=10, eval_windows=2, common=64, others=48, likely=4, checks=3,
        matrix_rate=0.05,
    )  # fmt: skip
    report = recover(student, dense, tmp_path / "out", texts=write_texts(tmp_path), settings=settings)
    assert report.blocks == (2,) and all(score.kl_after < 0.95 * score.kl_before for score in report.scores)
    before, after = (load_file(path / "model.safetensors") for path in (student, tmp_path / "out"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and not any(name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.bias")) for name in moved)
    assert any(name.endswith(("ln_f.weight", "norm.weight")) for name in moved)
