"""compress(method="mixt") from folder to folder on tiny models, judged by whole models run in PyTorch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import CompressionReport, Settings, compress, plan
from mixt_export.compression.texts import calibration_windows
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.network import densify
from mixt_export.progress import Silent
from mixt_export.reference import load_reference
from mixt_export.sample.texts import EVALUATION
from tests.compression.test_compress import Interrupting
from tests.tiny import write_tiny

SETTINGS = Settings(windows=6, window=32, batch=4)
LETTERS = list("abcdefgh \nßé")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A calibration text; the texts that controls are scored on are short ones of other letters."""
    rng = np.random.default_rng(0)
    for domain, letters in (("addresses", LETTERS), ("novel", list("mnopqr .,"))):
        path = tmp_path / f"{domain}.txt"
        path.write_text("".join(rng.choice(letters, 1500)), encoding="utf-8")
        monkeypatch.setitem(EVALUATION, domain, path)
    path = tmp_path / "text.txt"
    path.write_text("".join(rng.choice(LETTERS, 2000)), encoding="utf-8")
    yield path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "qwen2", max_position_embeddings=64)


def make(model: Path, output: Path, text: Path, **given: Any) -> CompressionReport:
    arguments: dict[str, Any] = {"method": "mixt", "calib": [text], "settings": SETTINGS, "blocks": "last:2"}
    return compress(model, output, **{**arguments, "refine_steps": 0, "controls": False, **given})


def rewritten(folder: Path, model: Path, change: dict[str, np.ndarray]) -> Path:
    """``model`` with some tensors of its single file replaced."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file({**load_file(model / "model.safetensors"), **change}, folder / "model.safetensors", {"format": "pt"})
    return folder


def activations(folder: Path, names: list[str], windows: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs (tokens, in) of the named linears when the whole model runs, float64."""
    loaded, caught = load_reference(folder, attn="sdpa"), {}
    for name in names:
        loaded.get_submodule(name).register_forward_hook(
            lambda _m, x, _y, name=name: caught.update({name: x[0].double().numpy().reshape(-1, x[0].shape[-1])})
        )
    with torch.no_grad():
        loaded(torch.from_numpy(windows))
    return caught


def test_a_folder_that_loads_and_equals_its_dense_matrices(tmp_path: Path, model: Path, text: Path) -> None:
    """Every linear as its float64 matrix in a dense folder gives the logits of the MixT folder."""
    report = make(model, tmp_path / "out", text, n_tensors={"q_proj|down": 2, "layers.2.*v_proj": 3}, refine_steps=4)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len(report.layers) == len(checkpoint.factors) == 14
    terms = {layer.name: layer.terms for layer in report.layers}
    assert terms["model.layers.1.mlp.down_proj"] == terms["model.layers.2.self_attn.q_proj"] == 2
    assert (terms["model.layers.1.self_attn.v_proj"], terms["model.layers.2.self_attn.v_proj"]) == (4, 3)
    assert all(len(checkpoint.factors[name].branches) == count for name, count in terms.items())
    assert all(
        branch.scale == 1 / count for name, count in terms.items() for branch in checkpoint.factors[name].branches
    )
    params = sum(ref.size for linear in checkpoint.factors.values() for ref in linear.core_tensors())
    assert params == report.linears_params_after == sum(layer.params for layer in report.layers)
    change = {
        f"{name}.weight": densify(linear, checkpoint.store.read).astype(np.float32)
        for name, linear in checkpoint.factors.items()
    }
    vectors = {
        name: checkpoint.store.read(name) for name in checkpoint.store if name.endswith(("norm.weight", ".bias"))
    }
    dense = rewritten(tmp_path / "dense", model, change | vectors)
    tokens = torch.arange(60).reshape(2, 30) * 7 % 256
    with torch.no_grad():
        found, expected = (load_reference(path)(tokens).logits for path in (tmp_path / "out", dense))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_refinement_writes_vectors_of_its_blocks_only(tmp_path: Path, model: Path, text: Path) -> None:
    report = make(model, tmp_path / "out", text, refine_steps=6)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    changed = {name for name in before if name in after and not np.array_equal(before[name], after[name])}
    assert {"model.layers.1.input_layernorm.weight", "model.layers.2.self_attn.q_proj.bias"} <= changed
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in changed)
    assert [(block.index, block.steps) for block in report.blocks] == [(1, 6), (2, 6)]


def test_errors_are_token_weighted_and_sequential(tmp_path: Path, model: Path, text: Path) -> None:
    """Mean of ||W x - W' x'||² / ||W x||² over tokens, x from the dense and x' from the finished model."""
    report = make(model, tmp_path / "out", text)
    windows, _ = calibration_windows(model, [text], 6, 32, 300)
    names = [layer.name for layer in report.layers]
    x, shifted = (activations(folder, names, windows) for folder in (model, tmp_path / "out"))
    dense, made = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    for layer in report.layers:
        wanted = x[layer.name] @ dense.store.read(f"{layer.name}.weight", "float64").T
        given = shifted[layer.name] @ densify(made.factors[layer.name], made.store.read).T
        ratios = ((wanted - given) ** 2).sum(1) / (wanted**2).sum(1)
        assert layer.output_error == pytest.approx(float(ratios.mean()), rel=1e-3)
    assert report.layers[0].output_error < 1


def test_fitting_beats_matching_and_deeper_sweeps_do_not_hurt(tmp_path: Path, model: Path, text: Path) -> None:
    errors = []
    for sweeps in (0, 1, 8):
        settings = Settings(windows=6, window=32, batch=4, term_sweeps=sweeps, term_ridge=1e-9)
        report = make(model, tmp_path / str(sweeps), text, settings=settings, blocks="last:1")
        errors.append([layer.output_error for layer in report.layers[:3]])  # q, k, v read the dense model's input
    assert all(later < earlier for earlier, later in zip(errors[0], errors[1], strict=True))
    assert all(later < earlier for earlier, later in zip(errors[1], errors[2], strict=True))


def nll_and_kl(folder: Path, model: Path, text: Path) -> tuple[float, float]:
    windows, _ = calibration_windows(model, [text], 4, 64, 300)
    with torch.no_grad():
        mine, truth = (
            load_reference(path, dtype="float64")(torch.from_numpy(windows)).logits[:, :-1].log_softmax(-1)
            for path in (folder, model)
        )
    picked = mine.gather(2, torch.from_numpy(windows)[:, 1:, None])
    return -float(picked.mean()), float((truth.exp() * (truth - mine)).sum(-1).mean())


def test_controls_are_what_they_say(tmp_path: Path, model: Path, text: Path) -> None:
    """Dense, compressed and deleted scores come again from whole folders, the last with zeroed tensors."""
    report = make(model, tmp_path / "out", text, controls=True, refine_steps=3, exclude=["up_proj"])
    assert report.controls is not None
    zeros = {
        name: np.zeros_like(values)
        for name, values in load_file(model / "model.safetensors").items()
        if any(name.startswith(f"{layer.name}.") for layer in report.layers)
    }
    assert len(zeros) == 12 + 6
    folders = {
        "dense": model,
        "compressed": tmp_path / "out",
        "deleted": rewritten(tmp_path / "deleted", model, zeros),
    }
    for scores in report.controls.texts:
        assert (scores.windows, scores.window, scores.domain) == (4, 64, "held out")
        for variant, folder in folders.items():
            nll, kl = nll_and_kl(folder, model, EVALUATION[scores.text])
            found = scores.scores[variant]
            assert found.nll == pytest.approx(nll, rel=1e-4)
            assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
            assert found.perplexity == pytest.approx(math.exp(found.nll))
        assert len({score.nll for score in scores.scores.values()}) == 4
    params = report.controls.params
    assert params["compressed"] == report.linears_params_after
    assert params["deleted"] == 0
    at_least = sum(layer.out_features + layer.in_features for layer in report.layers)
    assert at_least <= params["low rank"] <= max(params["compressed"], at_least)
    stored = json.loads((tmp_path / "out" / "compress_report.json").read_text())["controls"]
    assert stored["texts"][0]["scores"]["low rank"]["nll"] == report.controls.texts[0].scores["low rank"].nll


def test_the_low_rank_control_is_the_best_of_its_rank() -> None:
    """Weighted error of the control against the optimum by an independent whitened SVD; a random W' is worse."""
    from mixt_export.compression.tensor_mixture.moments import Moments, token_weights
    from mixt_export.compression.tensor_mixture.replacements import low_rank_solver

    rng = np.random.default_rng(3)
    x = rng.standard_normal((400, 12)) @ rng.standard_normal((12, 12))
    linear = torch.nn.Linear(12, 9, bias=False)
    weight = linear.weight.detach().numpy().astype(np.float64)
    y = x @ weight.T
    moments = Moments(9, 12)
    tokens, outputs = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    moments.add(outputs, tokens, token_weights(outputs))
    solve = low_rank_solver({"l": 3 * 21 + 5}, Settings(anchor_damping=1e-9))
    found = solve("l", linear, moments)
    assert found.linear.branches[0].cores[0].tensor.shape == (12, 3)
    root = 1 / np.linalg.norm(y, axis=1)[:, None]
    values = np.linalg.svd(y * root, compute_uv=False)
    assert found.error == pytest.approx((values[3:] ** 2).sum() / (values**2).sum(), rel=1e-3)


def test_a_bad_token_cannot_own_the_fit() -> None:
    """One token a thousand times larger: weighted moments are those of equal tokens."""
    from mixt_export.compression.tensor_mixture.moments import Moments, token_weights

    rng = np.random.default_rng(4)
    x = torch.from_numpy(rng.standard_normal((50, 6))).float()
    y = torch.from_numpy(rng.standard_normal((50, 5))).float()
    large = torch.ones(50, 1)
    large[7] = 1000.0
    plain, loud = Moments(5, 6), Moments(5, 6)
    plain.add(y, x, token_weights(y))
    loud.add(y * large, x * large, token_weights(y * large))
    torch.testing.assert_close(loud.gram, plain.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loud.cross, plain.cross, rtol=1e-5, atol=1e-6)
    assert loud.energy == pytest.approx(1.0, rel=1e-5)
    silent = token_weights(torch.zeros(3, 5))
    assert bool(torch.isfinite(silent * torch.zeros(3)).all())


def test_a_warning_where_mixt_is_not_better(tmp_path: Path, model: Path, text: Path) -> None:
    """The warnings name exactly the controls with a lower loss on some text."""
    report = make(model, tmp_path / "out", text, controls=True)
    assert report.controls is not None
    for control in ("low rank", "deleted"):
        lost = [t.text for t in report.controls.texts if t.scores["compressed"].nll >= t.scores[control].nll]
        mine = [warning for warning in report.controls.warnings if f"'{control}'" in warning]
        assert len(mine) == bool(lost)
        assert all(name in warning for warning in mine for name in lost)


@pytest.mark.parametrize("padding", [True, False])
def test_equal_arguments_give_equal_bytes(tmp_path: Path, model: Path, text: Path, padding: bool) -> None:
    given: dict[str, Any] = {"refine_steps": 3, "paper_padding": padding, "n_tensors": 3, "blocks": "1", "seed": 5}
    for name in ("a", "b"):
        make(model, tmp_path / name, text, **given)
    make(model, tmp_path / "controlled", text, **given, controls=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "controlled")]
    assert weights[0] == weights[1] == weights[2]
    shapes = {
        branch.padded for linear in open_checkpoint(tmp_path / "a").factors.values() for branch in linear.branches
    }
    assert shapes == {padding}


def test_half_precision_cores(tmp_path: Path, text: Path) -> None:
    model = write_tiny(tmp_path / "half", "llama", dtype="bfloat16")
    make(model, tmp_path / "out", text, n_tensors=2, bond=4, blocks="first:1", refine_steps=2)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {ref.dtype for linear in checkpoint.factors.values() for ref in linear.tensors()} == {"bfloat16"}
    assert all(name.startswith("model.layers.0.") for name in checkpoint.factors)
    assert checkpoint.store["model.layers.0.input_layernorm.weight"].ref.dtype == "bfloat16"
    load_reference(tmp_path / "out")


def test_the_plan_counts_without_weights(tmp_path: Path, model: Path, text: Path) -> None:
    given: dict[str, Any] = {"method": "mixt", "calib": [text], "blocks": "0,2", "n_tensors": ["3", "mlp=2"]}
    planned = plan(model, tmp_path / "out", **given)
    assert len(planned.targets) == 14
    report = make(model, tmp_path / "out", text, **given)
    assert (planned.budget, planned.dense) == (report.linears_params_after, report.linears_params_before)
    assert planned.recipe == report.recipe | {"refine_steps": planned.recipe["refine_steps"], "controls": True}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n_tensors": 5}, r"48 → 104.*2\^4 = 16.*--n-tensors 4 fits, --paper-padding pads them"),
        ({"n_tensors": 4, "bond": 3}, r"3\^3 = 27.*--exclude"),
        ({"n_tensors": 9, "paper_padding": True}, r"padded to powers of 2.*256.*--n-tensors 6 fits"),
        ({"n_tensors": 1}, "--n-tensors 1: MixT is a sum of 2 to 64"),
        ({"n_tensors": {"nothing": 3}}, "nothing.*matches none"),
        ({"n_tensors": ["2", "3"]}, "--n-tensors is 2 and 3"),
        ({"bond": 1}, "--bond 1"),
        ({"blocks": "last:9"}, "has 3 blocks"),
        ({"blocks": "2,3"}, "no block 3"),
        ({"refine_steps": -1}, "--refine-steps -1"),
        ({"seed": -1}, "--seed -1: give a whole number"),
        ({"seed": 1 << 31}, "--seed 2147483648: give a whole number"),
        ({"keep": 0.5}, "--keep does not apply to method mixt, which has --n-tensors"),
        ({"method": "svd", "n_tensors": 4, "refine_steps": None}, "--n-tensors does not apply to method svd"),
        ({"settings": Settings(fisher_windows=3)}, "fisher windows does not apply to method mixt"),
        ({"include": ["layers.0"]}, "matches none of the 14 linears"),
    ],
)
def test_bad_input_gets_one_sentence(
    tmp_path: Path, model: Path, text: Path, given: dict[str, Any], words: str
) -> None:
    arguments: dict[str, Any] = {"method": "mixt", "calib": [text], "settings": SETTINGS, "blocks": "last:2", **given}
    if arguments["method"] != "mixt":
        del arguments["refine_steps"]
    with pytest.raises(UsageError, match=words) as caught:
        compress(model, tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_text_too_short_is_named(tmp_path: Path, model: Path, text: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("few", encoding="utf-8")
    with pytest.raises(UsageError, match=r"short\.txt: no calibration tokens"):
        make(model, tmp_path / "out", short)


def test_low_rank_takes_blocks_too(tmp_path: Path, model: Path, text: Path) -> None:
    report = compress(model, tmp_path / "out", method="svd", keep=0.5, blocks="first:1")
    assert {layer.name.rsplit(".", 2)[0].split(".self")[0].split(".mlp")[0] for layer in report.layers} == {
        "model.layers.0"
    }
    assert len(report.layers) == 7


@pytest.mark.parametrize("label", ["replacing blocks", "scoring controls", "writing weights"])
def test_an_interruption_leaves_nothing(tmp_path: Path, model: Path, text: Path, label: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        make(model, tmp_path / "out", text, controls=True, progress=Interrupting(label))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_streams_on_disk_change_nothing(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(model, tmp_path / "memory", text, controls=True)
    monkeypatch.setattr("mixt_export.compression.scratch.IN_MEMORY", 1000)
    make(model, tmp_path / "disk", text, controls=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "disk")]
    assert weights[0] == weights[1]


def test_a_block_that_adds_nothing_is_replaced_by_one_that_adds_nothing(
    tmp_path: Path, model: Path, text: Path
) -> None:
    """Depth-expanded models start with zero o_proj and down_proj: neither weights nor losses may divide by them."""
    names = [
        f"model.layers.{index}.{name}.weight" for index in (1, 2) for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    stored = load_file(model / "model.safetensors")
    still = rewritten(tmp_path / "still", model, {name: np.zeros_like(stored[name]) for name in names})
    report = make(still, tmp_path / "out", text, refine_steps=2)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert all(math.isfinite(block.loss_after) for block in report.blocks)
    cores = [made[name] for name in made if "layers.1.mlp.down_proj.branch" in name]
    assert len(cores) == 4
    assert all(np.abs(core).max() < 0.1 for core in cores)


def test_no_numbers_are_no_success() -> None:
    from mixt_export.compression.controls import Controls, Score, TextScores

    scores = {name: Score.of(1.0, 0.1) for name in ("dense", "low rank", "deleted")}
    text = TextScores("t", "held out", 1, 8, {**scores, "compressed": Score.of(math.nan, math.nan)})
    assert len(Controls.of((text,), {}, "mixt").warnings) == 2


@pytest.mark.parametrize(("kind", "key"), [("cohere", "logit_scale")])
def test_unknown_families_that_scale_logits_are_refused(tmp_path: Path, kind: str, key: str) -> None:
    """Their blocks and head were run without the scale before: statistics and controls of another model."""
    folder = write_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, key: 0.25}))
    with pytest.raises(UnsupportedError, match=rf"{kind}.*{key}"):
        plan(folder, tmp_path / "out", method="mixt")


def test_blocks_that_keep_their_order_are_told(tmp_path: Path, model: Path, text: Path) -> None:
    said: list[str] = []

    class Notes(Silent):
        def note(self, message: str) -> None:
            said.append(message)

    given: dict[str, Any] = {"n_tensors": 2, "blocks": "last:1", "progress": Notes()}
    make(model, tmp_path / "whole", text, **given)
    make(model, tmp_path / "not asked", text, exclude=["down_proj"], permute=False, **given)
    make(model, tmp_path / "no mlp", text, exclude=["mlp"], **given)
    assert not said
    make(model, tmp_path / "part", text, exclude=["down_proj"], **given)
    assert len(said) == 1 and said[0].startswith("blocks 2 keep the order of their hidden channels")


def test_the_default_blocks_fit_a_small_model(tmp_path: Path) -> None:
    """last:4 is the default; a model of three blocks is taken whole, one that is asked for four is not."""
    folder = write_tiny(tmp_path / "model")
    assert plan(folder, tmp_path / "out", method="mixt", n_tensors=2).recipe["blocks"] == "all"
    with pytest.raises(UsageError, match="the model has 3 blocks"):
        plan(folder, tmp_path / "out", method="mixt", n_tensors=2, blocks="last:4")
