"""Factorised linears in every family, against transformers on the same model made dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.errors import CheckpointError, NetworkError
from mixt_export.families import decoder_of
from mixt_export.network import FactorizedLinear, build, densify
from mixt_export.reference import load_reference
from mixt_export.targets import export, plan_export
from mixt_export.targets.trt import TrtOptions
from tests.lower.matrix import logits_of, worst
from tests.ortrun import relative
from tests.tiny import write_tiny

torch.set_num_threads(1)

FAMILIES = ["gpt2", "gptj", "gemma2", "gemma3_text"]


def tensor_train(name: str, inputs: int, outputs: int) -> FactorizedLinear:
    return build.tensor_train(name, (2, inputs // 8, 4), (outputs // 8, 4, 2), (3, 5))


METHODS: dict[str, Callable[[str, int, int], FactorizedLinear]] = {
    "low rank": lambda name, inputs, outputs: build.low_rank(name, inputs, outputs, 7),
    "mixt": lambda name, inputs, outputs: build.mixt(name, inputs, outputs, 3),
    "tensor train": tensor_train,
}


def write(root: Path, family: str, method: str) -> tuple[Path, Path]:
    """A folder whose linears, all but each block's last, are of ``method``, and the same model dense."""
    dense = write_tiny(root / "dense", family)
    source = open_checkpoint(dense)
    tensors = load_file(dense / "model.safetensors")
    rng = np.random.default_rng(11)
    factors, cores = {}, {}
    for block in decoder_of(source.config).blocks:
        for linear in block.linears[:-1]:
            made = METHODS[method](linear.name, linear.in_features, linear.out_features)
            for ref in made.tensors():
                cores[ref.name] = (rng.standard_normal(ref.shape) / ref.shape[-1] ** 0.5).astype(np.float32)
            weight = densify(made, cores.__getitem__)
            gain = 1.3 / (np.linalg.norm(weight) / linear.out_features**0.5)
            first = made.tensors()[0].name
            if method != "mixt":  # its branches are summed: one core scales one of them only
                cores[first] = (cores[first] * gain).astype(np.float32)
            weight = densify(made, cores.__getitem__).astype(np.float32)
            tensors[f"{linear.name}.weight"] = np.ascontiguousarray(weight.T if linear.stored_transposed else weight)
            bias = source.store[f"{linear.name}.bias"].ref if linear.bias else None
            factors[linear.name] = replace(made, bias=bias)
    folder = root / "factorised"
    folder.mkdir()
    new = [NewTensor(name, "float32", core.shape, lambda core=core: core) for name, core in cores.items()]
    write_checkpoint(folder, source, new, factors, {})
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    return folder, dense


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_factorised(tmp_path: Path, family: str, method: str) -> None:
    folder, dense = write(tmp_path, family, method)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager").eval()
    ids = np.random.default_rng(1).integers(0, 300, 20)
    assert relative(logits_of(load_reference(folder), ids), logits_of(model, ids)) < 1e-5
    for name, options in (
        ("ort", {"target": "ort"}),
        ("onnx", {"target": "onnx"}),
        ("trt10", {"target": "trt", "trt": TrtOptions(jetpack=6)}),
    ):
        export(folder, tmp_path / name, verify=False, **options)
        assert worst(model, tmp_path / name, left_padded=name != "ort") < 1e-5, name


def test_factors_of_the_wrong_orientation_are_refused(tmp_path: Path) -> None:
    """Conv1D stores (in, out), the format speaks of features: a compressor that mixes them up must be told."""
    source, name = open_checkpoint(write_tiny(tmp_path / "dense", "gpt2")), "transformer.h.1.mlp.c_fc"
    wrong = build.low_rank(name, 104, 48, 5)
    with pytest.raises(NetworkError, match=r"c_fc.*of shape \(48,\), found float32 \(104,\)"):
        replace(wrong, bias=source.store[f"{name}.bias"].ref)
    (tmp_path / "model").mkdir()
    new = [NewTensor(t.name, "float32", t.shape, lambda t=t: np.ones(t.shape, np.float32)) for t in wrong.tensors()]
    write_checkpoint(tmp_path / "model", source, new, {name: wrong}, {})
    with pytest.raises(CheckpointError, match=r"c_fc: config.json wants \(in, out, bias\) = \(48, 104, True\)"):
        plan_export(tmp_path / "model")
