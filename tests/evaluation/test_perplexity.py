from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mixt_export.cli.guard import guarded
from mixt_export.cli.main import load_verb
from mixt_export.errors import UsageError
from mixt_export.evaluation import open_scorer, perplexity
from mixt_export.reference import load_reference
from tests.tiny import write_tiny
from tests.verification.handmade import write_handmade

torch.set_num_threads(1)
TEXT = "It was the best of times, it was the worst of times; naïve façades — 17 of them.\n" * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("evaluation") / "model", "qwen2", tied=False)


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    folder = write_handmade(model.parent / "exported", model)
    (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    return folder


def by_torch(model: Path, window: int) -> tuple[float, torch.Tensor]:
    """Mean cross entropy and log probabilities, by torch's own loss in float64."""
    network = load_reference(model, dtype="float64")
    ids = torch.tensor(Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids)
    rows = ids[: len(ids) // window * window].view(-1, window)
    with torch.inference_mode():
        logits = torch.cat([network(input_ids=row[None]).logits for row in rows])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    return float(loss), logits[:, :-1].flatten(0, 1).log_softmax(-1)


@pytest.mark.parametrize("window", [2, 17, 64])
def test_perplexity_is_torchs_cross_entropy(window: int, model: Path, exported: Path) -> None:
    wanted, _ = by_torch(model, window)
    for folder in (model, exported):
        score = perplexity(folder, TEXT, window=window, threads=1)
        assert score.nll == pytest.approx(wanted, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(wanted), rel=1e-4)
        assert score.tokens == score.windows * (window - 1)


def test_kl_and_agreement_against_another_model(model: Path, exported: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", "qwen2", tied=False, seed=9)
    score = perplexity(exported, TEXT, window=32, reference=other, threads=1)
    _, ours = by_torch(model, 32)
    nll, theirs = by_torch(other, 32)
    wanted = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    assert score.kl == pytest.approx(float(wanted), rel=1e-4)
    assert score.agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))
    assert score.other_perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    same = perplexity(exported, TEXT, window=32, reference=model, threads=1)
    assert same.kl == pytest.approx(0.0, abs=1e-8)
    assert same.agreement == 1.0


def test_windows_limit_and_short_texts(model: Path) -> None:
    scorer = open_scorer(model, 1)
    assert perplexity(scorer, TEXT, window=32, windows=2).tokens == 62
    short = perplexity(scorer, "abc", window=512)
    assert (short.tokens, short.windows) == (2, 1)
    with pytest.raises(UsageError, match="needs at least 2"):
        perplexity(scorer, "a")
    with pytest.raises(UsageError, match="--window"):
        perplexity(scorer, TEXT, window=1)


def test_only_one_window_of_logits_is_held(exported: Path) -> None:
    class Recording:
        engine, folder = "test", exported

        def __init__(self) -> None:
            self.lengths: list[int] = []

        def logits(self, tokens: np.ndarray) -> np.ndarray:
            self.lengths.append(len(tokens))
            return np.zeros((len(tokens), 300), np.float32)

    scorer = Recording()
    score = perplexity(scorer, TEXT, window=50)
    assert score.perplexity == pytest.approx(300.0)
    assert set(scorer.lengths) == {50}


def test_models_of_different_vocabularies_and_folders_that_are_none(model: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", "qwen2", tied=False, vocab_size=310)
    with pytest.raises(UsageError, match="310 tokens in its vocabulary"):
        perplexity(model, TEXT, window=32, windows=1, reference=other, threads=1)
    with pytest.raises(UsageError, match="is not a folder"):
        open_scorer(tmp_path / "nothing")
    with pytest.raises(UsageError, match="cannot run windows of 300 tokens"):
        perplexity(write_with_tokenizer(tmp_path / "made", model), TEXT, window=300, threads=1)


def write_with_tokenizer(folder: Path, model: Path) -> Path:
    write_handmade(folder, model)
    (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["mixt", *arguments])
    return guarded(load_verb("eval"), "mixt eval")


def test_cli_table_and_json(model: Path, exported: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    text = tmp_path / "[bold]odd.txt"
    text.write_text(TEXT, encoding="utf-8")
    options = ["--text", str(text), "--window", "32", "--windows", "2", "--threads", "1"]
    assert run(monkeypatch, str(exported), *options, "--against", str(model)) == 0
    out = capsys.readouterr().out
    assert "[bold]odd.txt" in out
    assert "1.0000" in out
    assert run(monkeypatch, str(exported), *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)["texts"][text.name]
    assert found["perplexity"] == pytest.approx(perplexity(model, TEXT, window=32, windows=2, threads=1).perplexity)


def test_cli_takes_the_shipped_texts(exported: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, str(exported), "--window", "32", "--windows", "1", "--threads", "1", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["texts"]) >= 2


def test_cli_bad_text_exits_2_before_loading(exported: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes("façade".encode("latin-1"))
    assert run(monkeypatch, str(tmp_path / "no-model"), "--text", str(text)) == 2
    assert "not UTF-8" in capsys.readouterr().err
