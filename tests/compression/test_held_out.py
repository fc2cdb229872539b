"""Perplexity before and after in the report, against whole models in PyTorch on the same windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixt_export.compression import Settings, compress
from mixt_export.compression.texts import calibration_windows
from mixt_export.errors import UsageError
from mixt_export.reference import load_reference
from tests.tiny import write_tiny

SETTINGS = Settings(windows=6, window=32, batch=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text("".join(rng.choice(list("abcdefgh \nßé"), 4000)), encoding="utf-8")
    return path


def scored(folder: Path, windows: np.ndarray) -> torch.Tensor:
    """Log probabilities of the next tokens (windows, length - 1, vocabulary), float64."""
    with torch.no_grad():
        logits: torch.Tensor = load_reference(folder)(torch.from_numpy(windows)).logits
    return logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"keep": 0.6}),
        ("gpt2", {"keep": 0.6, "method": "svd"}),
        ("qwen2", {"method": "tucker", "keep": 0.7}),
        ("llama", {"method": "mixt", "n_tensors": 2, "controls": False, "refine_steps": 2}),
    ],
)
def test_scores_are_those_of_the_whole_models(tmp_path: Path, text: Path, family: str, options: dict[str, Any]) -> None:
    """Every structure, refined norms and permuted MLPs included: the written folder is what is scored."""
    model = write_tiny(tmp_path / "model", family)
    output = tmp_path / "out"
    report = compress(model, output, calib=[text], eval_text=[text], settings=SETTINGS, **options)
    (found,) = report.evaluation
    assert (found.text, found.domain) == (str(text), "held out")
    windows, _ = calibration_windows(model, [text], found.windows, found.window, 300)
    assert windows.shape == (2, found.window)
    targets = torch.from_numpy(windows)[:, 1:, None]
    dense, compressed = scored(model, windows), scored(output, windows)
    for name, logs in (("dense", dense), ("compressed", compressed)):
        nll = -float(logs.gather(-1, targets).mean())
        assert found.scores[name].nll == pytest.approx(nll, rel=1e-5)
        assert found.scores[name].perplexity == pytest.approx(np.exp(nll), rel=1e-4)
    kl = float((dense.exp() * (dense - compressed)).sum(-1).mean())
    assert kl > 1e-3, "nothing was compressed"
    assert found.scores["compressed"].kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert found.scores["dense"].kl == pytest.approx(0.0, abs=1e-9)
    stored = json.loads((output / "compress_report.json").read_text())
    assert stored["evaluation"][0]["scores"]["compressed"]["kl"] == found.scores["compressed"].kl
    assert stored["seconds"]["evaluation"] > 0


def test_shipped_texts_by_default_and_the_dense_model_from_the_cache(tmp_path: Path, text: Path) -> None:
    model = write_tiny(tmp_path / "model")
    cache = tmp_path / "cache"
    runs = [
        compress(model, tmp_path / name, keep=keep, calib=calib, settings=SETTINGS, cache=cache)
        for name, keep, calib in (("a", 0.6, [text]), ("b", 0.8, [text]), ("c", 0.8, []))
    ]
    assert [[score.domain for score in run.evaluation] for run in runs] == [
        ["held out"] * 2,
        ["held out"] * 2,
        ["in domain", "out of domain"],
    ]
    assert "outputs" not in runs[0].cached
    assert "outputs" in runs[1].cached
    assert runs[0].evaluation[0].scores["dense"] == runs[1].evaluation[0].scores["dense"]
    assert runs[0].evaluation[0].scores["compressed"] != runs[1].evaluation[0].scores["compressed"]


def test_what_cannot_be_scored_is_not_and_what_was_asked_for_is_an_error(tmp_path: Path, text: Path) -> None:
    model = write_tiny(tmp_path / "model")
    assert compress(model, tmp_path / "a", calib=[text], settings=SETTINGS, evaluate=False).evaluation == ()
    with pytest.raises(UsageError, match="no such"):
        compress(model, tmp_path / "b", calib=[text], settings=SETTINGS, eval_text=[tmp_path / "no such"])
    (model / "tokenizer.json").unlink()
    assert compress(model, tmp_path / "c", method="svd").evaluation == ()
