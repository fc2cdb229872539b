"""Exporting encoders from the command line: what is written, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixt_export.cli.guard import guarded
from mixt_export.cli.main import load_verb
from mixt_export.errors import CheckpointError, UnsupportedError, UsageError
from mixt_export.families.encoders import encoder_of
from mixt_export.targets import export, plan_export
from mixt_export.targets.trt import TrtOptions
from tests.tiny_encoder import write_tiny_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder") / "model")


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", list(arguments))
    return guarded(load_verb(arguments[0]), arguments[0])


def test_the_folder_says_what_it_is(model: Path, tmp_path: Path) -> None:
    result = export(model, tmp_path / "out", max_seq_len=40, verify=False)
    assert result.ok
    manifest = json.loads((tmp_path / "out" / "mixt_manifest.json").read_text(encoding="utf-8"))
    assert manifest["kind"] == "encoder"
    assert manifest["limits"] == {"max_seq_len": 40}
    assert manifest["model"] == {"model_type": "bert", "layers": 3, "hidden_size": 48, "heads": 4}
    assert len(manifest["linears"]) == 18
    assert {entry["method"] for entry in manifest["linears"].values()} == {"dense"}
    assert manifest["memory"]["weight_bytes"] >= 4 * sum(e["params"] for e in manifest["linears"].values())
    assert (tmp_path / "out" / "device" / "embed.py").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_verified_from_the_command_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "export", str(model), "-o", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "bert encoder, 3 layers, 0 of 18 linears factorised" in said
    assert said.strip().endswith("PASSED")
    assert called(monkeypatch, "run", str(tmp_path / "out"), "-p", "hi") == 2
    assert "is of an encoder, which makes no text" in capsys.readouterr().err
    assert called(monkeypatch, "inspect", str(tmp_path / "out")) == 0


def test_a_dry_run_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "export", str(model), "-o", str(tmp_path / "out"), "--dry-run") == 0
    said = capsys.readouterr().out
    assert "predicted memory, one sequence of 64 tokens" in said
    assert "nothing was written" in said
    assert not (tmp_path / "out").exists()


def test_what_an_encoder_cannot_have_is_refused(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="--target trt: takes decoders"):
        plan_export(model, target="trt")
    with pytest.raises(UsageError, match="--max-batch is an option of --target trt"):
        plan_export(model, trt=TrtOptions(max_batch=2))
    with pytest.raises(UsageError, match="--max-seq-len 65: the model knows positions 1 to 64"):
        plan_export(model, max_seq_len=65)
    with pytest.raises(UsageError, match="--num-layers 4: the model has 3 layers"):
        plan_export(model, num_layers=4)


WORDS = {"embeddings.word_embeddings.weight"}
BERT = {
    "model_type": "bert",
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 104,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers 5000 is beyond any model"),
        ({"hidden_size": "48"}, "hidden_size must be a positive integer"),
        ({"layer_norm_eps": -1}, "layer_norm_eps must be a positive number"),
        ({"model_type": "roberta", "pad_token_id": -1}, "pad_token_id must be a whole number from 0 on"),
        ({"model_type": "roberta", "max_position_embeddings": 2}, "leaves no position behind pad_token_id 1"),
    ],
)
def test_a_config_that_contradicts_itself_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        encoder_of(BERT | change, WORDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act = 'silu' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder is set"),
    ],
)
def test_another_variant_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        encoder_of(BERT | change, WORDS)


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"holds neither '.*' nor 'bert"):
        encoder_of(BERT, {"roberta.embeddings.word_embeddings.weight"})
