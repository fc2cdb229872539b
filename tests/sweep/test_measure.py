"""Measuring from the first changed block on equals running the whole model, computed here by torch in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression.scratch import Scratch
from mixt_export.errors import CheckpointError, UnsupportedError, UsageError
from mixt_export.progress import SILENT
from mixt_export.reference import load_reference
from mixt_export.sweep import SweepOptions
from mixt_export.sweep.material import Material, prepare
from mixt_export.sweep.measure import Decoder, Measured, Probe
from tests.sweep.setup import TEXT, write_material
from tests.tiny import write_tiny_low_rank

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_material(tmp_path_factory.mktemp("measure"), model_type="qwen2")
    write_tiny_low_rank(folder / "student", folder / "model", 20, include=lambda name: ".2." in name)
    return folder


def options(folder: Path, scoring: str = "letters", **given: Any) -> SweepOptions:
    plain = {"texts": (folder / "text.txt",), "questions": str(folder / "questions.jsonl")}
    return SweepOptions(method="svd", window=32, windows=3, scoring=scoring, **{**plain, **given})


def measure(folder: Path, scoring: str, tmp_path: Path, unchanged: int) -> tuple[Material, Measured, Measured]:
    material = prepare(open_checkpoint(folder / "model"), options(folder, scoring), SILENT)
    probe = Probe(material, Scratch(tmp_path), SILENT)
    dense = probe.dense(load_reference(folder / "model", attn="sdpa"), {2, 3})
    return material, dense, probe.student(load_reference(folder / "student", attn="sdpa"), unchanged)


def expected_text(folder: Path) -> tuple[float, float, float]:
    """NLL, KL and agreement per token, by torch's own losses over whole models in float64."""
    ids = torch.tensor(
        Tokenizer.from_file(str(folder / "model" / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    )[: 3 * 32].view(3, 32)
    with torch.inference_mode():
        ours, theirs = (
            load_reference(folder / name, dtype="float64")(input_ids=ids).logits[:, :-1].flatten(0, 1)
            for name in ("student", "model")
        )
    nll = torch.nn.functional.cross_entropy(ours, ids[:, 1:].flatten())
    kl = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum")
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return float(nll), float(kl) / len(ours), float(agreed)


@pytest.mark.parametrize("unchanged", [0, 2])
def test_texts(folder: Path, tmp_path: Path, unchanged: int) -> None:
    _, dense, student = measure(folder, "letters", tmp_path, unchanged)
    (figures,) = student.texts
    nll, kl, agreed = expected_text(folder)
    assert figures.tokens == 3 * 31
    assert figures.nll / figures.tokens == pytest.approx(nll, rel=1e-5)
    assert figures.kl / figures.tokens == pytest.approx(kl, rel=1e-4)
    assert figures.agreed / figures.tokens == pytest.approx(agreed)
    assert (dense.texts[0].kl, dense.texts[0].agreed) == (0.0, figures.tokens)


@pytest.mark.parametrize("scoring", ["letters", "continuation"])
@pytest.mark.parametrize("unchanged", [0, 1, 2])
def test_questions(folder: Path, tmp_path: Path, scoring: str, unchanged: int) -> None:
    material, dense, student = measure(folder, scoring, tmp_path, unchanged)
    for name, found in (("model", dense), ("student", student)):
        network: Any = load_reference(folder / name, dtype="float64")
        for number, question in enumerate(material.questions):
            values: dict[int, list[float]] = {choice: [] for choice in range(4)}
            with torch.inference_mode():
                for sequence in question.sequences:
                    out = network(torch.from_numpy(sequence.tokens)[None], output_hidden_states=True)
                    logs = out.logits[0].log_softmax(-1)
                    for read in sequence.reads:
                        values[read.choice].append(float(logs[read.position, read.token]))
            scores = np.array([np.mean(values[choice]) for choice in range(4)])
            p = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(found.probabilities[number], p, rtol=2e-4)
            hidden = torch.stack(out.hidden_states[:-1])[:, 0, question.position].numpy()
            np.testing.assert_allclose(found.states[number, :-1], hidden, atol=2e-4, rtol=2e-4)
    if scoring == "letters":
        assert student.mass is not None and 0.0 < student.mass < 1.0
    else:
        assert student.mass is None


def test_the_last_state_is_the_residual_stream_before_the_final_norm(folder: Path, tmp_path: Path) -> None:
    material, dense, _ = measure(folder, "letters", tmp_path, 0)
    network: Any = load_reference(folder / "model")
    with torch.inference_mode():
        for number, question in enumerate(material.questions):
            final = network.model(torch.from_numpy(question.sequences[0].tokens)[None]).last_hidden_state
            normed = network.model.norm(torch.from_numpy(dense.states[number, -1]))
            torch.testing.assert_close(normed, final[0, question.position], atol=1e-5, rtol=1e-4)


def test_blocks_before_the_first_changed_one_are_not_run(folder: Path, tmp_path: Path) -> None:
    material = prepare(open_checkpoint(folder / "model"), options(folder), SILENT)
    probe = Probe(material, Scratch(tmp_path), SILENT)
    probe.dense(load_reference(folder / "model", attn="sdpa"), {2})
    student: Any = load_reference(folder / "student", attn="sdpa")
    for layer in student.model.layers[:2]:
        for parameter in layer.parameters():
            parameter.data.fill_(math.nan)
    measured = probe.student(student, 2)
    assert math.isfinite(measured.texts[0].nll)
    assert np.isfinite(measured.states).all()


def test_a_model_with_more_than_a_head_is_refused(folder: Path) -> None:
    model: Any = load_reference(folder / "model")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden)
    Decoder(model).check_head(np.arange(8))

    def scaled(*given: Any, **named: Any) -> Any:
        out = type(model).forward(model, *given, **named)
        out.logits = out.logits * 2.0
        return out

    model.forward = scaled
    with pytest.raises(UnsupportedError, match="logits are more than"):
        Decoder(model).check_head(np.arange(8))


def test_material_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder / "model")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(UsageError, match="has 10 tokens, which is less than one window of 32"):
        prepare(checkpoint, options(folder, texts=(short,)), SILENT)
    with pytest.raises(UsageError, match="reads at most 256"):
        prepare(checkpoint, SweepOptions(window=300, questions=str(folder / "questions.jsonl")), SILENT)
    with pytest.raises(UsageError, match="--score 'magic'"):
        prepare(checkpoint, options(folder, "magic"), SILENT)
    (folder / "model" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
            prepare(checkpoint, options(folder), SILENT)
    finally:
        (tmp_path / "tokenizer.json").rename(folder / "model" / "tokenizer.json")


def test_texts_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    given = options(folder, texts=(folder / "text.txt", tmp_path / "text.txt"))
    material = prepare(open_checkpoint(folder / "model"), given, SILENT)
    assert [text.name for text in material.texts] == ["1:text.txt", "2:text.txt"]
    assert {text.domain for text in material.texts} == {"own"}
    assert [one["windows"] for one in material.description["texts"]] == [3, 3]
