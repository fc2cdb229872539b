"""Tiny models made of the authors' modules, the files their code writes, and the parity of what is exported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from mixt_export import export
from tests.checkpoints.foreign.modules import randomised
from tests.ortrun import Graph, relative
from tests.tiny import tiny_config, tiny_tensors, write_tiny, write_tokenizer

torch.set_num_threads(1)

#: Relative L2 in float32 that every reader must reach.
BAR = 1e-5


def dense(family: str = "llama", **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A random dense model of ``family`` in PyTorch, two layers, and its config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config = tiny_config(family, **{layers: 2, "tied": True, **overrides})
    made = AutoConfig.for_model(family).from_dict(config)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    tensors = {name: torch.from_numpy(value) for name, value in tiny_tensors(config).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval().requires_grad_(False), config


def linears(model: nn.Module) -> Iterator[tuple[str, int, int, bool]]:
    """Name, in, out and bias of every linear in the layers."""
    for name, module in model.named_modules():
        if "layers." in name or ".h." in name:
            if isinstance(module, nn.Linear):
                yield name, module.in_features, module.out_features, module.bias is not None
            elif type(module).__name__ == "Conv1D":
                yield name, module.nx, module.nf, True


def factorise(
    model: nn.Module,
    make: Callable[[int, int, int, bool], nn.Module],
    rank: Callable[[str], int | None] = lambda name: 7 if "k_proj" in name else 11,
) -> dict[str, int]:
    """Replace linears by ``make(in, out, rank, bias)``; ``rank(name)`` None keeps one dense. Returns the ranks."""
    ranks = {}
    for seed, (name, inner, outer, bias) in enumerate(list(linears(model))):
        chosen = rank(name)
        if chosen is not None:
            ranks[name] = chosen
            model.set_submodule(name, randomised(make(inner, outer, chosen, bias), seed))
    return ranks


def tensors_of(model: nn.Module, *, tied: bool = True) -> dict[str, torch.Tensor]:
    """state_dict as save_pretrained writes it: contiguous copies, without a tied head."""
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    if tied:
        state.pop("lm_head.weight", None)
    return state


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None) -> Path:
    """config.json, model.safetensors and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    write_tokenizer(folder)
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_base(folder: Path, config: dict[str, Any]) -> Path:
    """The dense folder whose weights ``dense`` gives for the same configuration."""
    overrides = {key: value for key, value in config.items() if key not in ("model_type", "tie_word_embeddings")}
    return write_tiny(folder, config["model_type"], tied=config["tie_word_embeddings"], **overrides)


def logits(model: nn.Module, ids: np.ndarray) -> np.ndarray:
    """(batch, seq, vocab) of the authors' model in PyTorch float32."""
    with torch.inference_mode():
        found: np.ndarray = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    return found


def errors(folder: Path, model: nn.Module, output: Path, targets: tuple[str, ...] = ("ort", "onnx")) -> list[float]:
    """Relative L2 of the exported model against ``model``: prefill of two sequences, then one more token each.

    Target ort keeps past and present apart here, which it allows.
    """
    rng = np.random.default_rng(7)
    ids = rng.integers(0, 250, (2, 9))
    expected = logits(model, ids)
    found = []
    for target in targets:
        result = export(folder, output / target, target=target, verify=False, max_seq_len=32)
        assert result.manifest["model"]["model_type"] in ("llama", "mistral", "qwen2", "qwen3", "gpt2")
        graph = Graph(output / target)
        for row in range(2):
            first, cache = graph.run(ids[row : row + 1, :6])
            found.append(relative(first[0], expected[row, 5]))
            for position in range(6, 9):
                step, cache = graph.run(ids[row : row + 1, position : position + 1], cache)
                found.append(relative(step[0], expected[row, position]))
        together, _ = graph.run(ids)
        found.append(relative(together, expected[:, -1]))
    return found


def assert_parity(folder: Path, model: nn.Module, output: Path, targets: tuple[str, ...] = ("ort", "onnx")) -> None:
    """Every comparison of ``errors`` is within the bar, and config.json beside the export is a usable one."""
    worst = max(errors(folder, model, output, targets))
    assert worst <= BAR, worst
    written = json.loads((output / targets[0] / "config.json").read_text())
    assert written["model_type"] in ("llama", "mistral", "qwen2", "qwen3", "gpt2")
    assert "auto_map" not in written
