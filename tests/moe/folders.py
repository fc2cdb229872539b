"""Tiny mixture-of-experts folders: stacked, and with random factors that all experts of a layer share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.network import FactorizedLinear, build
from tests.tiny import write_tiny

#: Sizes of an expert's linears in the tiny model, (in, out), and ranks of both sides.
KINDS = {"gate_proj": (48, 40, 24, 16), "up_proj": (48, 40, 16, 24), "down_proj": (40, 48, 16, 24)}


def stacked(folder: Path, base: Path) -> Path:
    """``base`` (one file) written as transformers holds experts in memory: one tensor per layer and side."""
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    layers = {name.split(".experts.")[0] for name in tensors if ".experts." in name}
    for layer in layers:
        count = len({name for name in tensors if name.startswith(f"{layer}.experts.") and "down_proj" in name})
        parts = {
            kind: np.stack([tensors[f"{layer}.experts.{expert}.{kind}.weight"] for expert in range(count)])
            for kind in KINDS
        }
        result[f"{layer}.experts.gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
        result[f"{layer}.experts.down_proj"] = parts["down_proj"]
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    for companion in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / companion).write_bytes((base / companion).read_bytes())
    return folder


Make = Callable[[str, str], FactorizedLinear | None]


def td_moe(name: str, kind: str) -> FactorizedLinear:
    """The expert's linear ``name`` with a core of its own between factors that its layer's experts share."""
    inside, outside, r_in, r_out = KINDS[kind]
    shared = f"{name.split('.experts.')[0]}.experts.{kind}"
    names = (f"{shared}.u_in", f"{name}.core", f"{shared}.u_out")
    return build.tucker2(name, inside, outside, r_in, r_out, names=names, method="td-moe")


def write_factorised(folder: Path, make: Make = td_moe, **config: object) -> Path:
    """A tiny model whose experts' linears are ``make(name, kind)`` with random tensors; None: that one stays dense."""
    base = write_tiny(folder / "base", "qwen3_moe", **config)
    source, rng = open_checkpoint(base), np.random.default_rng(5)
    factors: dict[str, FactorizedLinear] = {}
    tensors: dict[str, NewTensor] = {}
    for stored in source.store:
        name = stored.removesuffix(".weight")
        made = make(name, name.rpartition(".")[2]) if ".experts." in name else None
        if made is None:
            continue
        factors[name] = made
        for ref in made.tensors():
            core = (1.2 * rng.standard_normal(ref.shape) / np.sqrt(ref.shape[0])).astype(np.float32)
            tensors.setdefault(ref.name, NewTensor(ref.name, "float32", ref.shape, lambda core=core: core))
    (folder / "model").mkdir()
    write_checkpoint(folder / "model", source, list(tensors.values()), factors, {"method": "random"})
    return folder / "model"
