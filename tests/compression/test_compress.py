"""compress() from folder to folder on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import METHODS, CompressionReport, Settings, compress, plan
from mixt_export.compression.method import OBJECTIVES, LowRankMethod, get_method
from mixt_export.compression.self_text import sampled_windows
from mixt_export.errors import CheckpointError, MixtError, UnsupportedError, UsageError
from mixt_export.network import densify
from mixt_export.progress import SILENT, Advance
from mixt_export.reference import load_reference
from tests.tiny import write_tiny, write_tiny_low_rank

LOW_RANK = {name: method for name in METHODS if isinstance(method := get_method(name), LowRankMethod)}
SETTINGS = Settings(windows=6, window=32, fisher_windows=3, batch=2)
TOKENS = torch.arange(60).reshape(2, 30) * 7 % 256


def logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_reference(folder, dtype=dtype)(TOKENS).logits
    return found


def divergence(folder: Path, model: Path) -> float:
    """Mean KL(dense || compressed) in nats."""
    dense, other = (logits(path).log_softmax(-1) for path in (model, folder))
    return float((dense.exp() * (dense - other)).sum(-1).mean())


@pytest.mark.parametrize(
    ("method", "objective"), [(name, objective) for name, known in LOW_RANK.items() for objective in known.objectives]
)
def test_every_method_and_objective(tmp_path: Path, model: Path, text: Path, method: str, objective: str) -> None:
    output = tmp_path / "out"
    report = compress(model, output, method=method, objective=objective, keep=0.7, calib=[text], settings=SETTINGS)
    checkpoint = open_checkpoint(output)
    assert (report.method, report.recipe["objective"]) == (method, objective)
    params = sum(
        sum(core.tensor.size for core in checkpoint.factors[layer.name].branches[0].cores)
        if layer.rank is not None
        else layer.out_features * layer.in_features
        for layer in report.layers
    )
    assert params == report.linears_params_after == sum(layer.params for layer in report.layers)
    assert report.keep_achieved == pytest.approx(params / report.linears_params_before)
    assert 0.695 < report.keep_achieved <= 0.7
    assert set(checkpoint.factors) == {layer.name for layer in report.layers if layer.rank is not None}
    assert 0 < divergence(output, model) < 6
    stored = json.loads((output / "compress_report.json").read_text())
    assert stored["method"] == checkpoint.info["method"] == method
    assert len(stored["layers"]) == 21
    assert [key in stored["seconds"] for key in ("ranks", "writing", "evaluation")] == [True] * 3
    assert stored["peak_rss_bytes"] > 1e7
    assert report.model_params_before - report.model_params_after == report.linears_params_before - params
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"], "scratch was left behind"


@pytest.mark.parametrize("options", [{}, {"method": "svd", "ranks": "relative"}])
def test_reported_errors_are_those_of_the_written_factors(
    tmp_path: Path, model: Path, text: Path, options: dict[str, Any]
) -> None:
    """Relative output error from independent activations of the whole dense model on the same windows."""
    output = tmp_path / "out"
    settings = replace(SETTINGS, input_damping=1e-9)
    report = compress(model, output, keep=0.6, calib=[text], settings=settings, **options)
    dense, checkpoint = load_reference(model), open_checkpoint(output)
    from mixt_export.compression.texts import calibration_windows

    windows, _ = calibration_windows(model, [text], 6, 32, 300)
    caught: dict[str, np.ndarray] = {}
    for layer in report.layers:
        dense.get_submodule(layer.name).register_forward_hook(
            lambda _m, x, _y, name=layer.name: caught.update({name: x[0].double().numpy().reshape(-1, x[0].shape[-1])})
        )
    with torch.no_grad():
        dense(torch.from_numpy(windows))
    for layer in report.layers:
        if layer.rank is None:
            assert layer.output_error == layer.loss_tail == 0.0
            continue
        weight = checkpoint_weight(model, layer.name)
        change = weight - densify(checkpoint.factors[layer.name], checkpoint.store.read)
        x = caught[layer.name]
        expected = float(((x @ change.T) ** 2).sum() / ((x @ weight.T) ** 2).sum())
        assert layer.output_error == pytest.approx(expected, rel=1e-2, abs=1e-5)


def checkpoint_weight(folder: Path, name: str) -> np.ndarray:
    return open_checkpoint(folder).store.read(f"{name}.weight", "float64")


def test_the_anchored_objective_pays_off_on_its_own_measure(tmp_path: Path, model: Path, text: Path) -> None:
    """Sequential output errors: anchored is below shift-aware in every factorised layer's sum."""
    errors = {}
    for objective in ("anchored", "shift-aware"):
        report = compress(
            model, tmp_path / objective, method="aa-svd", objective=objective, keep=0.5, calib=[text], settings=SETTINGS
        )
        errors[objective] = sum(layer.output_error for layer in report.layers)
    assert errors["anchored"] < errors["shift-aware"]


def test_gfw_estimates_and_beats_plain_svd(tmp_path: Path, model: Path, text: Path) -> None:
    found = {}
    for method in ("gfw-svd", "svd"):
        compress(model, tmp_path / method, method=method, keep=0.7, calib=[text], settings=SETTINGS)
        found[method] = divergence(tmp_path / method, model)
    assert found["gfw-svd"] < found["svd"]


def test_full_rank_keeps_the_function(tmp_path: Path, model: Path, text: Path) -> None:
    ranks = tmp_path / "ranks.json"
    ranks.write_text(json.dumps({r".*(q|o|gate|up|down)_proj": 48, ".*": "dense"}))
    for method in LOW_RANK:
        report = compress(model, tmp_path / method, method=method, ranks=ranks, calib=[text], settings=SETTINGS)
        assert report.keep_achieved > 1
        torch.testing.assert_close(logits(tmp_path / method), logits(model), rtol=1e-3, atol=2e-3)


def test_equal_arguments_give_equal_bytes(tmp_path: Path, model: Path, text: Path) -> None:
    for name in ("a", "b"):
        compress(model, tmp_path / name, keep=0.6, calib=[text, "self"], seed=3, settings=SETTINGS)
    compress(model, tmp_path / "c", keep=0.6, calib=[text, "self"], seed=4, settings=SETTINGS)
    first, second, third = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "compress_report.json"}
        for name in "abc"
    )
    assert first == second
    assert first != third, "the seed of self calibration has no effect"


def test_self_calibration_samples_from_the_model(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model is nearly certain of its next token, so are the samples; batches differ from each other."""
    monkeypatch.setattr("mixt_export.compression.self_text.AT_ONCE", 4)
    windows, report = sampled_windows(open_checkpoint(model), 6, 20, 1, SILENT)
    assert windows.shape == (6, 20)
    assert (report.source, report.windows, report.tokens) == ("self", 6, 120)
    assert len({tuple(row) for row in windows.tolist()}) == 6
    with torch.no_grad():
        shares = load_reference(model)(torch.from_numpy(windows)).logits.softmax(-1)[:, :-1]
    chosen = shares.gather(-1, torch.from_numpy(windows)[:, 1:, None])
    expected = shares.square().sum(-1)  # mean probability of a token drawn from the shares
    assert float(chosen.mean()) == pytest.approx(float(expected.mean()), rel=0.3)
    assert float(chosen.mean()) > 5 / 300


def test_streams_on_disk_change_nothing(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"objective": "anchored", "keep": 0.6, "calib": [text], "settings": SETTINGS}
    compress(model, tmp_path / "memory", **given)
    monkeypatch.setattr("mixt_export.compression.scratch.IN_MEMORY", 1000)
    compress(model, tmp_path / "disk", **given)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "disk")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_factors_have_the_source_dtype_unless_asked(tmp_path: Path, text: Path, dtype: str) -> None:
    model = write_tiny(tmp_path / "half", "llama", dtype=dtype, shards=2)
    compress(model, tmp_path / "same", keep=0.6, calib=[text], settings=SETTINGS)
    compress(model, tmp_path / "wide", keep=0.6, calib=[text], settings=SETTINGS, dtype="float32")
    for name, expected in (("same", dtype), ("wide", "float32")):
        factors = open_checkpoint(tmp_path / name).factors
        assert {core.tensor.dtype for f in factors.values() for b in f.branches for core in b.cores} == {expected}
    torch.testing.assert_close(logits(tmp_path / "same"), logits(tmp_path / "wide"), rtol=0.1, atol=0.2)


def test_include_exclude_and_json_ranks_decide(tmp_path: Path, model: Path, text: Path) -> None:
    ranks = tmp_path / "ranks.json"
    ranks.write_text(json.dumps({"model.layers.1.mlp.up_proj": 5, ".*gate_proj": 7, ".*": "dense"}))
    report = compress(
        model,
        tmp_path / "out",
        calib=[text],
        settings=SETTINGS,
        ranks=ranks,
        include=[r"layers\.[12]\.mlp"],
        exclude=["down"],
    )
    found = {layer.name: layer.rank for layer in report.layers}
    assert found == {
        "model.layers.1.mlp.gate_proj": 7,
        "model.layers.1.mlp.up_proj": 5,
        "model.layers.2.mlp.gate_proj": 7,
        "model.layers.2.mlp.up_proj": None,
    }
    assert {
        name: f.branches[0].cores[0].tensor.shape for name, f in open_checkpoint(tmp_path / "out").factors.items()
    } == {
        "model.layers.1.mlp.gate_proj": (48, 7),
        "model.layers.1.mlp.up_proj": (48, 5),
        "model.layers.2.mlp.gate_proj": (48, 7),
    }


def test_texts_are_mixed_evenly_and_recorded(tmp_path: Path, model: Path, text: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("xyz " * 20, encoding="utf-8")
    report = compress(model, tmp_path / "out", calib=[text, short], settings=SETTINGS)
    assert [(Path(t.source).name, t.windows) for t in report.texts] == [("text.txt", 4), ("short.txt", 2)]
    assert all(len(t.sha256) == 64 for t in report.texts)


class Interrupting:
    """A Progress that presses Ctrl-C when a task called ``label`` advances."""

    def __init__(self, label: str) -> None:
        self.label = label

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        def advance(_units: int) -> None:
            if label == self.label:
                raise KeyboardInterrupt

        yield advance

    def note(self, message: str) -> None:
        """Nothing."""


@pytest.mark.parametrize("label", ["input statistics", "output statistics", "compressing blocks", "writing weights"])
def test_an_interruption_leaves_nothing(tmp_path: Path, model: Path, text: Path, label: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(
            model,
            tmp_path / "out",
            objective="anchored",
            calib=[text],
            settings=SETTINGS,
            progress=Interrupting(label),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def bad(tmp_path: Path, model: Path, text: Path) -> list[tuple[dict[str, Any], type[MixtError], str]]:
    empty, latin, short = (tmp_path / name for name in ("empty.txt", "latin.txt", "few.txt"))
    empty.write_bytes(b"")
    latin.write_bytes(b"caf\xe9 " * 500)
    short.write_text("few", encoding="utf-8")
    return [
        ({"keep": 0.0}, UsageError, "keep"),
        ({"keep": 1.01}, UsageError, "keep"),
        ({"keep": float("nan")}, UsageError, "keep"),
        ({"method": "magic"}, UnsupportedError, "gfw-svd"),
        ({"method": "svd", "objective": "anchored"}, UsageError, "input-agnostic"),
        ({"objective": "best"}, UsageError, "best"),
        ({"include": ["lm_head"]}, UsageError, "lm_head.*matches none"),
        ({"include": ["("]}, UsageError, "regular expression"),
        ({"exclude": ["."]}, UsageError, "no linear"),
        ({"ranks": "clever"}, UsageError, "clever"),
        ({"dtype": "int4"}, UsageError, "int4"),
        ({"calib": [empty]}, UsageError, "no calibration tokens"),
        ({"calib": [short]}, UsageError, "no calibration tokens"),
        ({"calib": [latin]}, UsageError, "UTF-8"),
        ({"calib": [tmp_path / "nowhere.txt"]}, UsageError, "nowhere"),
        ({"settings": replace(SETTINGS), "keep": 0.001}, UsageError, "too small"),
        ({"overwrite": False, "output": model}, UsageError, "input"),
    ]


def test_bad_input_gets_one_sentence_and_no_output(tmp_path: Path, model: Path, text: Path) -> None:
    for given, error, words in bad(tmp_path, model, text):
        arguments: dict[str, Any] = {"output": tmp_path / "out", "calib": [text], "settings": SETTINGS, **given}
        with pytest.raises(error, match=words) as caught:
            compress(model, **arguments)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="windows is 0"):
        Settings(windows=0)
    with pytest.raises(UsageError, match="damping"):
        Settings(input_damping=0.0)


def test_a_missing_or_foreign_tokenizer_is_named(tmp_path: Path, model: Path, text: Path) -> None:
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        compress(model, tmp_path / "out", calib=[text], settings=SETTINGS)
    compress(model, tmp_path / "plain", method="svd")  # needs no text
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        compress(model, tmp_path / "out", calib=[text], settings=SETTINGS)
    small = write_tiny(tmp_path / "small", vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    (small / "tokenizer.json").write_text(tokenizer)
    with pytest.raises(CheckpointError, match="another model"):
        compress(small, tmp_path / "out", calib=[text], settings=SETTINGS)


def test_a_factorised_folder_is_refused(tmp_path: Path, model: Path, text: Path) -> None:
    folder = write_tiny_low_rank(tmp_path / "low", model, 4)
    with pytest.raises(UnsupportedError, match="factorised already"):
        compress(folder, tmp_path / "out", calib=[text])


def test_overwriting(tmp_path: Path, model: Path, text: Path) -> None:
    compress(model, tmp_path / "out", calib=[text], settings=SETTINGS)
    with pytest.raises(UsageError, match="--overwrite"):
        compress(model, tmp_path / "out", calib=[text], settings=SETTINGS)
    compress(model, tmp_path / "out", calib=[text], settings=SETTINGS, overwrite=True, keep=0.5)
    assert open_checkpoint(tmp_path / "out").info["recipe"]["keep"] == 0.5


def test_the_plan_agrees_with_the_run(tmp_path: Path, model: Path, text: Path) -> None:
    planned = plan(model, tmp_path / "out", keep=0.6, calib=[text], settings=SETTINGS)
    assert not (tmp_path / "out").exists()
    report: CompressionReport = compress(model, tmp_path / "out", keep=0.6, calib=[text], settings=SETTINGS)
    assert planned.targets == tuple(layer.name for layer in report.layers)
    assert planned.dense == report.linears_params_before
    assert report.linears_params_after <= planned.budget
    assert planned.recipe["objective"] in OBJECTIVES


_MEASURE = """
import sys, torch
torch.set_num_threads(1)
from mixt_export.compression import Settings, compress
settings = Settings(windows=2, window=32, fisher_windows=2, batch=2)
compress(sys.argv[1], sys.argv[1] + "-small", calib=[sys.argv[3]], settings=settings)
before = compress(sys.argv[1], sys.argv[1] + "-again", calib=[sys.argv[3]], settings=settings).peak_rss_bytes
print(compress(sys.argv[2], sys.argv[2] + "-out", calib=[sys.argv[3]], settings=settings).peak_rss_bytes - before)
"""


def test_peak_memory_is_bounded_by_a_block_not_the_model(tmp_path: Path, text: Path) -> None:
    """After a model of 2 blocks one of 14 equal blocks: of 45 MB more weights less than a third shows in the peak."""
    sizes: dict[str, Any] = {"hidden_size": 288, "intermediate_size": 800, "head_dim": 72}
    small = write_tiny(tmp_path / "small", "llama", num_hidden_layers=2, **sizes)
    large = write_tiny(tmp_path / "large", "llama", num_hidden_layers=14, **sizes)
    extra = (large / "model.safetensors").stat().st_size - (small / "model.safetensors").stat().st_size
    found = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small), str(large), str(text)], check=True, capture_output=True, text=True
    )
    assert int(found.stdout) < extra / 3
