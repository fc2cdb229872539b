"""Range of float16: what a scan finds, which islands follow, and that models built to overflow are rescued."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.families import decoder_of
from mixt_export.lower.overflow import Extremes, islands_for
from mixt_export.reference import load_reference
from mixt_export.targets import export, plan_export
from mixt_export.targets.rewriting import Rewriting
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification.graph import open_graph
from mixt_export.verification.overflow import inner_peak, scan
from mixt_export.verification.session import ExportedRunner
from tests.ortrun import relative
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

torch.set_num_threads(1)


def scaled(folder: Path, factors: dict[str, float]) -> Path:
    """``folder`` with the tensors whose names end so multiplied."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        for ending, factor in factors.items():
            if name.endswith(ending):
                tensors[name] = (tensors[name].astype(np.float64) * factor).astype(np.float32)
    metadata = {"format": "mixt-factors" if (folder / "mixt_factors.json").is_file() else "pt"}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder


def dense(root: Path, factors: dict[str, float], family: str = "llama") -> Path:
    return scaled(write_tiny(root / "model", family, num_hidden_layers=2), factors)


def low_rank(root: Path, factors: dict[str, float]) -> Path:
    base = write_tiny(root / "base", "qwen2", num_hidden_layers=2)
    return scaled(write_tiny_low_rank(root / "model", base), factors)


#: name -> (how to make the folder, what must be found)
RESCUED = {
    "residual stream": (lambda root: dense(root, {"0.mlp.down_proj.weight": 3e4}), "model.layers.0.mlp.down_proj"),
    "a linear's input": (
        lambda root: dense(root, {"1.mlp.up_proj.weight": 3e4, "1.mlp.down_proj.weight": 1e-4}),
        "model.layers.1.mlp.down_proj",
    ),
    "attention scores": (
        lambda root: dense(root, {"1.self_attn.q_proj.weight": 400.0, "1.self_attn.k_proj.weight": 400.0}),
        1,
    ),
    "queries": (
        lambda root: dense(root, {"0.self_attn.q_proj.weight": 5e4, "0.self_attn.k_proj.weight": 1e-5}),
        "model.layers.0.self_attn.q_proj",
    ),
    "between factors": (
        lambda root: low_rank(root, {"0.mlp.gate_proj.core0": 1e5, "0.mlp.gate_proj.core1": 1e-5}),
        "model.layers.0.mlp.gate_proj",
    ),
    "with a bias": (
        lambda root: low_rank(root, {"1.self_attn.q_proj.core0": 1e5, "1.self_attn.q_proj.core1": 1e-5}),
        "model.layers.1.self_attn.q_proj",
    ),
    "before a head norm": (
        lambda root: dense(root, {"1.self_attn.k_proj.weight": 5e4}, "qwen3"),
        "model.layers.1.self_attn.k_proj",
    ),
}


@pytest.mark.parametrize("jetpack", [6, 7])
@pytest.mark.parametrize("case", RESCUED)
def test_a_model_built_to_overflow_is_rescued(tmp_path: Path, case: str, jetpack: int) -> None:
    make, wanted = RESCUED[case]
    folder = make(tmp_path)
    ids = np.random.default_rng(3).integers(0, 300, 24)
    with torch.no_grad():
        expected = load_reference(folder)(torch.tensor(ids[None])).logits[0, -1].numpy()

    unbalanced = Rewriting(balance="none")  # balanced factors do not overflow: tests/passes

    def error(out: Path, scanned: bool) -> float:
        trt = TrtOptions(jetpack=jetpack, scan=scanned)
        export(folder, out, target="trt", dtype="fp16", verify=False, trt=trt, rewriting=unbalanced)
        with np.errstate(all="ignore"):
            return relative(ExportedRunner(open_graph(out), 1).full(ids).logits[0, -1], expected)

    naive = error(tmp_path / "naive", False)
    # Scores inside the fused operator of JetPack 7 are its kernel's affair and cannot overflow here.
    inside = wanted == 1 and jetpack == 7
    assert inside or not naive < 0.2, "it does not overflow without islands; the test says nothing"
    assert error(tmp_path / "rescued", True) < 2e-2
    said = json.loads((tmp_path / "rescued" / "mixt_manifest.json").read_text())["trt"]
    assert wanted in (said["islands"]["attention"] if isinstance(wanted, int) else said["islands"]["linears"])
    assert said["overflow"]["tokens"] > 100 and said["overflow"]["largest"]


@pytest.mark.parametrize(
    ("factors", "text"),
    [
        ({"1.self_attn.k_proj.weight": 1e6}, r"block 1: cached keys reach .* --dtype bf16"),
        ({"0.self_attn.v_proj.weight": 1e6}, r"block 0: cached values reach .* --dtype bf16"),
        ({"0.mlp.down_proj.weight": 1e9}, r"model.layers.0.mlp.down_proj: .* too far beyond"),
        ({"0.mlp.up_proj.weight": 1e38, "0.mlp.gate_proj.weight": 1e3}, r"not finite in float32 already"),
    ],
)
def test_what_cannot_be_rescued_is_refused(tmp_path: Path, factors: dict[str, float], text: str) -> None:
    folder = dense(tmp_path, factors)
    with pytest.raises(UnsupportedError, match=text):
        export(folder, tmp_path / "out", target="trt", dtype="fp16", verify=False, trt=TrtOptions(scan=True))
    assert not (tmp_path / "out").exists()


def test_the_scan_sees_what_hooks_see(tmp_path: Path) -> None:
    """Against maxima taken by hand from transformers' own hidden states and projections."""
    folder = dense(tmp_path, {})
    checkpoint = open_checkpoint(folder)
    seen = scan(checkpoint, decoder_of(checkpoint.config), max_length=256)
    assert seen.tokens > 256 and len(seen.residual) == 3 and len(seen.scores) == 2
    model = load_reference(folder)
    ids = np.frombuffer(b"The capital of France is", np.uint8).astype(np.int64)
    with torch.no_grad():
        states = model(torch.tensor(ids[None] % 256), output_hidden_states=True).hidden_states
    assert seen.residual[0] <= float(model.get_input_embeddings().weight.abs().max())
    assert 0.3 < seen.residual[1] / float(states[1].abs().max()) < 3
    bound = max(seen.inputs[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj"))
    weight = model.get_submodule("model.layers.0.self_attn.k_proj").weight
    assert seen.keys[0] <= 1.5 * bound * float(weight.abs().sum(1).max())


@pytest.mark.parametrize("padded", [False, True])
def test_between_the_factors_of_a_mixture(tmp_path: Path, padded: bool) -> None:
    """The largest unscaled branch and the largest partial sum, by dense Kronecker products."""
    from mixt_export.network import densify

    base = write_tiny(tmp_path / "base", num_hidden_layers=1)
    folder = write_tiny_mixt(tmp_path / "model", base, 3, paper_padding=padded)
    checkpoint = open_checkpoint(folder)
    linear = checkpoint.factors["model.layers.0.mlp.up_proj"]

    def load(name: str) -> np.ndarray:
        return checkpoint.store.read(name, "float32")

    x = np.random.default_rng(5).standard_normal((7, linear.in_features)).astype(np.float32)
    from dataclasses import replace

    alone = [x @ densify(replace(linear, branches=(replace(branch, scale=1.0),)), load).T for branch in linear.branches]
    peaks = [np.abs(y).max() for y in alone] + [np.abs(sum(alone[: n + 1])).max() for n in range(len(alone))]
    assert inner_peak(linear, load, x) == pytest.approx(max(peaks), rel=1e-4)


def extremes(**given: object) -> Extremes:
    return Extremes(tokens=10, **{"residual": (1.0, 2.0, 3.0), "scores": (1.0, 1.0), **given})


@pytest.fixture
def decoder(tmp_path: Path) -> object:
    return decoder_of(open_checkpoint(write_tiny(tmp_path / "plain", num_hidden_layers=2)).config)


def test_small_numbers_need_no_island(decoder: object) -> None:
    assert not islands_for(extremes(outputs={"model.layers.0.mlp.up_proj": 32000.0}), decoder)


def test_a_scale_is_no_larger_than_it_must_be(decoder: object) -> None:
    up = "model.layers.0.mlp.up_proj"
    found = islands_for(extremes(inner={up: 65504.0}), decoder)
    assert dict(found.shifts) == {up: 3} and not found.residual and not found.attention


def test_a_writer_takes_the_stream_along(decoder: object) -> None:
    found = islands_for(extremes(outputs={"model.layers.1.self_attn.o_proj": 1e5}), decoder)
    assert found.residual and "model.layers.1.self_attn.o_proj" in found.shifts


@pytest.mark.parametrize(
    "entry", ["nonsense", "attention.9", "model.layers.0.mlp.up_proj=0", "residual=2", "lm_head=x"]
)
def test_bad_islands(tmp_path: Path, entry: str) -> None:
    folder = write_tiny(tmp_path / "model", num_hidden_layers=2)
    with pytest.raises(UsageError, match=f"--island {entry}"):
        plan_export(folder, target="trt", dtype="fp16", trt=TrtOptions(islands=(entry,)))
