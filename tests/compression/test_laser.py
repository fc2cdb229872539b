"""compress(method="laser"): truncated SVDs, the greedy search against one over whole models, bad options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import CompressionReport, Settings, compress
from mixt_export.compression.texts import calibration_windows
from mixt_export.network import densify
from mixt_export.reference import load_reference
from tests.compression.test_cli import mixt
from tests.tiny import write_tiny

torch.set_num_threads(1)
SETTINGS = Settings(window=32, batch=3)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("abcdefgh \nßé"), 3000)), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", max_position_embeddings=64)


def make(model: Path, output: Path, **given: Any) -> CompressionReport:
    return compress(model, output, **{"method": "laser", "settings": SETTINGS, **given})


def truncated(weight: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank], np.float32)


def test_an_edited_matrix_keeps_its_layout(tmp_path: Path) -> None:
    """GPT-2 stores its linears as (in, out); the truncated matrix goes back the same way."""
    source, name = write_tiny(tmp_path / "gpt2", "gpt2"), "transformer.h.2.mlp.c_fc.weight"
    weight = next(iter(load_file(path) for path in source.glob("*.safetensors")))[name]
    assert weight.shape[0] != weight.shape[1]
    make(source, tmp_path / "out", search=False, rho=[0.8], blocks="2", include=["c_fc"])
    stored = load_file(tmp_path / "out" / "model.safetensors")[name]
    np.testing.assert_allclose(stored, truncated(weight, int(0.8 * min(weight.shape))), atol=1e-6)


def test_without_a_search_all_are_truncated(tmp_path: Path, model: Path) -> None:
    """0.25 saves parameters and becomes factors; 0.8 would not, and becomes the truncated matrix itself."""
    name = "model.layers.2.mlp.up_proj"
    weight = load_file(model / "model.safetensors")[f"{name}.weight"]
    small = make(model, tmp_path / "small", search=False, rho=[0.25], blocks="2", include=["up"])
    checkpoint = open_checkpoint(tmp_path / "small")
    dense = densify(checkpoint.factors[name], lambda tensor: checkpoint.store.read(tensor, "float32"))
    np.testing.assert_allclose(dense, truncated(weight, 12), atol=1e-6)
    assert small.linears_params_after == 12 * (48 + 104)
    large = make(model, tmp_path / "large", search=False, rho=[0.8], blocks="2", include=["up"])
    assert not open_checkpoint(tmp_path / "large").factors
    stored = load_file(tmp_path / "large" / "model.safetensors")[f"{name}.weight"]
    np.testing.assert_allclose(stored, truncated(weight, 38), atol=1e-6)
    assert not np.allclose(stored, weight, atol=1e-3)
    (layer,) = large.layers
    assert (layer.method, layer.rank, layer.params) == ("edited", 38, 48 * 104)
    energies = np.linalg.svd(weight.astype(np.float64), compute_uv=False) ** 2
    assert layer.output_error == pytest.approx(energies[38:].sum() / energies.sum(), rel=1e-6)


def test_the_search_is_greedy_from_the_last_block(tmp_path: Path, model: Path, text: Path) -> None:
    """The same edits as trying them one by one in whole models."""
    rho = (0.02, 0.1, 0.3)
    report = make(
        model, tmp_path / "out", rho=rho, blocks="1,2", include=["o_proj", "down"], calib=[text], search_windows=3
    )
    windows, _ = calibration_windows(model, [text], 6, 32, 300)
    tokens = torch.from_numpy(windows[0::2])
    reference = load_reference(model)

    def loss() -> float:
        with torch.no_grad():
            logits = reference(tokens).logits[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits.double(), tokens[:, 1:].flatten()))

    best = loss()
    assert report.search is not None
    assert report.search.before == pytest.approx(best, rel=1e-6)
    expected: dict[str, int] = {}
    for index in (2, 1):
        for inside in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{inside}"
            linear: Any = reference.get_submodule(name)
            kept = linear.weight.detach().clone()
            trials = []
            for rank in (max(1, int(share * 48)) for share in rho):
                linear.weight.data.copy_(torch.from_numpy(truncated(kept.numpy(), rank)))
                trials.append((loss(), rank))
            lowest, rank = min(trials)
            linear.weight.data.copy_(kept)
            if lowest < best:
                best, expected[name] = lowest, rank
                linear.weight.data.copy_(torch.from_numpy(truncated(kept.numpy(), rank)))
    assert expected
    assert {layer.name: layer.rank for layer in report.layers if layer.rank} == expected
    assert report.search.after == pytest.approx(best, rel=1e-6)
    assert report.search.trials == 12
    assert report.search.finished
    gained = -sum(layer.loss_tail for layer in report.layers if layer.loss_tail is not None)
    assert gained == pytest.approx(report.search.before - report.search.after, rel=1e-6)
    with torch.no_grad():
        written = load_reference(tmp_path / "out")(tokens).logits
        np.testing.assert_allclose(written, reference(tokens).logits, atol=1e-4)


def test_equal_runs_give_equal_files(tmp_path: Path, model: Path, text: Path) -> None:
    for name in "ab":
        make(model, tmp_path / name, rho=[0.1], blocks="2", calib=[text], search_windows=2)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_a_search_out_of_time_leaves_what_it_has(tmp_path: Path, model: Path, text: Path) -> None:
    report = make(model, tmp_path / "out", minutes=1e-9, blocks="last:2", calib=[text], search_windows=2)
    assert report.search is not None
    assert not report.search.finished
    assert report.search.trials == 0
    assert report.search.check_before == report.search.check_after
    assert report.keep_achieved == 1.0
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rho", "0"], "above 0"),
        (["--rho", "1.5"], "up to 1"),
        (["--no-search"], "exactly one"),
        (["--search-windows", "0"], "at least 1"),
        (["--minutes", "0"], "above 0"),
        (["--keep", "0.5"], "does not apply to method laser"),
    ],
)
def test_mistakes_end_in_one_sentence_and_code_2(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert mixt(model, "-o", tmp_path / "out", "--method", "laser", "--blocks", "2", *arguments) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_text_too_short_is_said(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b c d e f g h i j k l m n o p" * 2, encoding="utf-8")
    arguments = ("--blocks", "2", "--calib", short, "--window", "32")
    assert mixt(model, "-o", tmp_path / "out", "--method", "laser", *arguments) == 2
    assert "two windows" in capsys.readouterr().err.replace("\n", " ")
