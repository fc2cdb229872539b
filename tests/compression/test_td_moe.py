"""TD-MoE: the decomposition against a float64 oracle, ranks against the share asked for, whole runs on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mixt_export import compress
from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression.settings import Settings
from mixt_export.compression.td_moe.decomposition import decompose, spectra
from mixt_export.compression.td_moe.sizing import CLOSE, MULTIPLE, Stack, choose
from mixt_export.errors import CheckpointError, UnsupportedError, UsageError
from mixt_export.network import densify
from mixt_export.reference import load_reference
from mixt_export.targets import export
from mixt_export.verification import VerifyOptions, verify
from tests.tiny import write_tiny

torch.set_num_threads(1)
SMALL = Settings(windows=3, window=48)
QUICK = VerifyOptions(positions=40, greedy_tokens=4, memory=False, threads=1, write=False)


def experts(count: int, rows: int, columns: int, seed: int = 0) -> list[torch.Tensor]:
    """Matrices with common dominant directions and noise."""
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((rows, 9)), rng.standard_normal((9, columns))
    mixed = [left @ rng.standard_normal((9, 9)) @ right + rng.standard_normal((rows, columns)) for _ in range(count)]
    return [torch.from_numpy(matrix.astype(np.float32)) for matrix in mixed]


def rebuilt(factors: object) -> np.ndarray:
    return np.stack([(factors.u_in @ core @ factors.u_out).T.numpy() for core in factors.cores])  # type: ignore[attr-defined]


def test_it_is_the_truncated_hosvd() -> None:
    """Oracle: singular vectors of the two unfoldings of the stacked tensor in float64, and the projection onto them."""
    weights = experts(5, 24, 32)
    tensor = np.stack([weight.numpy() for weight in weights]).astype(np.float64)
    u_out = np.linalg.svd(tensor.transpose(1, 0, 2).reshape(24, -1))[0][:, :8]
    u_in = np.linalg.svd(tensor.transpose(2, 0, 1).reshape(32, -1))[0][:, :16]
    expected = np.einsum("oO,cC,eOC->eoc", u_out @ u_out.T, u_in @ u_in.T, tensor)
    found = decompose(spectra(weights, None, None), 16, 8)
    assert np.linalg.norm(rebuilt(found) - expected) < 1e-5 * np.linalg.norm(expected)
    errors = ((expected - tensor) ** 2).sum((1, 2)) / (tensor**2).sum((1, 2))
    assert np.allclose(found.errors, errors, rtol=1e-4)
    assert torch.allclose(found.u_in.norm(dim=0), torch.ones(16, dtype=torch.float64))


@pytest.mark.parametrize("weighed", ["input", "output", "both"])
def test_weighing_lowers_the_weighed_error(weighed: str) -> None:
    weights, rng = experts(4, 24, 32), np.random.default_rng(3)
    x = rng.standard_normal((500, 32)) * np.geomspace(10, 0.1, 32)
    g = rng.standard_normal((500, 24)) * np.geomspace(0.1, 10, 24)
    gram = torch.from_numpy(x.T @ x / 500) if weighed != "output" else None
    metric = torch.from_numpy(g.T @ g / 500) if weighed != "input" else None
    tensor = np.stack([weight.numpy() for weight in weights]).astype(np.float64)
    s = np.eye(32) if gram is None else gram.numpy()
    f = np.eye(24) if metric is None else metric.numpy()

    def cost(other: np.ndarray) -> float:
        difference = other - tensor
        return float(np.einsum("eoi,ij,epj,op->", difference, s, difference, f))

    plain = decompose(spectra(weights, None, None), 16, 8)
    found = decompose(spectra(weights, gram, metric), 16, 8)
    assert cost(rebuilt(found)) < 0.9 * cost(rebuilt(plain))
    total = np.array([np.einsum("oi,ij,pj,op->", w, s, w, f) for w in tensor])
    assert np.isclose(np.dot(found.errors, total), cost(rebuilt(found)), rtol=1e-4)


def test_full_ranks_are_exact_whatever_the_statistics() -> None:
    weights = experts(3, 16, 24)
    noise = np.random.default_rng(1).standard_normal((100, 24))
    gram = torch.from_numpy(noise.T @ noise)
    found = decompose(spectra(weights, gram, None), 24, 16)
    tensor = np.stack([weight.numpy() for weight in weights])
    assert np.linalg.norm(rebuilt(found) - tensor) < 1e-5 * np.linalg.norm(tensor)


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.8, 0.95])
@pytest.mark.parametrize("sizes", [(128, 768, 2048), (64, 1408, 2048), (16, 256, 512)])
def test_ranks_keep_what_was_asked_for(sizes: tuple[int, int, int], keep: float) -> None:
    stack = Stack("experts", *sizes)
    of_in, of_out = (np.sort(np.random.default_rng(n).exponential(size=n))[::-1] for n in (sizes[2], sizes[1]))
    r_in, r_out = choose(stack, keep, of_in, of_out)
    assert r_in % MULTIPLE == r_out % MULTIPLE == 0
    assert abs(stack.parameters(r_in, r_out) / stack.dense / keep - 1) <= CLOSE
    others = [
        ranks for ranks in stack.candidates(keep) if abs(stack.parameters(*ranks) / stack.dense / keep - 1) <= CLOSE
    ]
    best = min(of_in[a:].sum() + of_out[b:].sum() for a, b in others)
    assert np.isclose(of_in[r_in:].sum() + of_out[r_out:].sum(), best)


def test_a_run_and_its_report(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "qwen3_moe", moe_intermediate_size=64)
    report = compress(base, tmp_path / "out", method="td-moe", keep=0.8, expert_down=True, settings=SMALL)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert len(report.layers) == len(checkpoint.factors) == 2 * 6 * 3
    assert abs(report.keep_achieved - 0.8) < 0.05
    stored = sum(tensor.ref.size for tensor in checkpoint.store.values())
    assert report.model_params_after == stored
    linears = checkpoint.factors.values()
    tensors = {ref.name: ref.size for linear in linears for ref in linear.tensors()}
    assert sum(tensors.values()) == report.linears_params_after
    one, other = (checkpoint.factors[f"model.layers.0.mlp.experts.{expert}.up_proj"] for expert in (0, 5))
    assert [a.name == b.name for a, b in zip(one.tensors(), other.tensors(), strict=True)] == [True, False, True]
    source = open_checkpoint(base).store
    for layer in report.layers:
        exact = source.read(f"{layer.name}.weight").astype(np.float64)
        found = densify(checkpoint.factors[layer.name], checkpoint.store.read)
        assert np.linalg.norm(found - exact) < 0.9 * np.linalg.norm(exact)
        assert 0.0 <= layer.output_error < 0.5


def test_statistics_of_inputs_help_on_the_texts(tmp_path: Path) -> None:
    """Errors over the calibration inputs, from the report of the weighed run and recomputed for the plain one."""
    base = write_tiny(tmp_path / "base", "qwen3_moe", num_hidden_layers=1, mlp_only_layers=[])
    errors = {}
    for whitening in ("none", "input"):
        compress(base, tmp_path / whitening, method="td-moe", keep=0.5, whitening=whitening, settings=SMALL)
        ids = torch.tensor(np.random.default_rng(0).integers(97, 122, (1, 200)))
        with torch.no_grad():
            expected = load_reference(base)(ids).logits
            errors[whitening] = float((load_reference(tmp_path / whitening)(ids).logits - expected).norm())
    assert errors["input"] < errors["none"]


@pytest.mark.parametrize("target", ["ort", "onnx", "trt"])
def test_it_exports_and_passes(tmp_path: Path, target: str) -> None:
    base = write_tiny(tmp_path / "base", "qwen3_moe", num_hidden_layers=2)
    compress(base, tmp_path / "model", method="td-moe", keep=0.7, whitening="none", expert_down=True)
    export(tmp_path / "model", tmp_path / "out", target=target, max_seq_len=96, verify=False)
    report = verify(tmp_path / "out", tmp_path / "model", options=QUICK)
    assert report.passed and report.minimum_tolerance is not None and report.minimum_tolerance < 1e-5


def test_the_same_options_give_the_same_bytes(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "qwen3_moe", num_hidden_layers=1)
    for name in ("one", "two"):
        compress(base, tmp_path / name, method="td-moe", keep=0.6, settings=SMALL)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


REFUSALS = {
    "a dense model": ("llama", {}, UsageError, "none of the linears chosen of this 'llama' model is one"),
    "part of the experts": (
        "qwen3_moe",
        {"exclude": [r"experts\.3\."]},
        UsageError,
        "leave 5 of the 6 experts in model",
    ),
    "too little": ("qwen3_moe", {"keep": 0.01}, UsageError, r"--keep 0.01: .*\(gate_proj\) keeps at least 0\.0944"),
    "no share": ("qwen3_moe", {"keep": 1.5}, UsageError, "--keep 1.5 is not a share"),
    "another weighing": ("qwen3_moe", {"whitening": "x"}, UsageError, "--whitening 'x' is unknown"),
    "a foreign option": ("qwen3_moe", {"ranks": "uniform"}, UsageError, "--ranks does not apply to method td-moe"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusals(tmp_path: Path, refusal: str) -> None:
    model_type, options, error, text = REFUSALS[refusal]
    base = write_tiny(tmp_path / "base", model_type)
    with pytest.raises(error, match=text):
        compress(base, tmp_path / "out", method="td-moe", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_experts_of_unequal_shapes(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "qwen3_moe")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:32])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"experts in model\.layers\.2\.mlp\.experts have up_proj of unequal shapes"
    ):
        compress(base, tmp_path / "out", method="td-moe")


@pytest.mark.parametrize("method", ["aa-svd", "mixt"])
def test_methods_that_pair_tokens_refuse_experts(tmp_path: Path, method: str) -> None:
    base = write_tiny(tmp_path / "base", "qwen3_moe")
    with pytest.raises(UnsupportedError, match="their routers send tokens to different experts"):
        compress(base, tmp_path / "out", method=method, blocks="all")


@pytest.mark.parametrize("method", ["svd", "svd-llm", "gfw-svd"])
def test_low_rank_methods_take_experts(tmp_path: Path, method: str) -> None:
    base = write_tiny(tmp_path / "base", "qwen3_moe", num_hidden_layers=1, num_experts=12, num_experts_per_tok=1)
    settings = replace(SMALL, fisher_windows=1) if method == "gfw-svd" else SMALL
    report = compress(base, tmp_path / "model", method=method, keep=0.7, settings=settings)
    assert sum(".experts." in layer.name and layer.rank is not None for layer in report.layers) > 12
    export(tmp_path / "model", tmp_path / "out", target="onnx", max_seq_len=96, verify=False)
    proof = verify(tmp_path / "out", tmp_path / "model", options=QUICK)
    assert proof.passed and proof.minimum_tolerance is not None and proof.minimum_tolerance < 1e-5
