"""What is fuzzed: kinds of folders that people hand over, and what reads them before anything is computed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.errors import MixtError
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}

Files = dict[str, bytes]


@dataclass(frozen=True)
class Surface:
    """``make`` writes a whole folder, ``read`` reads it; only ``errors`` may come out of it.

    ``skip``: not mutated. ``named``: files that a user names, each by its path, so that links are followed.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], None]
    errors: Callable[[], tuple[type[Exception], ...]]
    skip: tuple[str, ...] = ()
    named: tuple[str, ...] = ()


def _documented() -> tuple[type[Exception], ...]:
    return (MixtError,)


def read_model(folder: Path) -> None:
    """Everything that looks at a model folder: reader, every tensor, inspection, plans of an export."""
    from mixt_export.checkpoints import check_finite, open_checkpoint
    from mixt_export.inspection import inspect
    from mixt_export.network import densify
    from mixt_export.targets.dispatch import plan_export

    checkpoint = open_checkpoint(folder)
    for name in checkpoint.store:
        checkpoint.store.read(name)
    for linear in checkpoint.factors.values():
        densify(linear, checkpoint.store.read)
    inspect(folder)
    for file in ("tokenizer.json", "generation_config.json"):
        checkpoint.companion(file)
    plan_export(folder)
    check_finite(checkpoint.store)


def read_adapter(folder: Path) -> None:
    """A LoRA adapter whose base model the user names: what the adapter calls it is then not looked at."""
    from mixt_export.checkpoints.foreign.over_base import BASE_VARIABLE

    before = os.environ.get(BASE_VARIABLE)
    os.environ[BASE_VARIABLE] = str(folder / "base")
    try:
        read_model(folder)
    finally:
        os.environ.pop(BASE_VARIABLE)
        if before is not None:
            os.environ[BASE_VARIABLE] = before


def read_ort(folder: Path) -> None:
    """An exported folder: the device runtime's readers, inspection, the graph as verification opens it."""
    from mixt_export.errors import UsageError
    from mixt_export.inspection import inspect
    from mixt_export.runtime import load_runtime
    from mixt_export.verification.graph import open_graph

    runtime: Any = load_runtime("ort")
    failures: list[Exception] = []
    for step in (
        lambda: runtime.read_manifest(folder),
        lambda: runtime.Tokenizer(folder).encode_chat([{"role": "user", "content": "hello"}]),
        lambda: inspect(folder),
        lambda: open_graph(folder).vocab_size,
    ):
        try:
            step()
        except (runtime.OrtRuntimeError, MixtError) as error:
            failures.append(error)
    if failures:
        raise UsageError(str(failures[0]))


def read_trt(folder: Path) -> None:
    """A folder for a board: the manifest, the kernels, golden tensors, the stamp of an engine."""
    from mixt_export.building.toolkit import toolkit
    from mixt_export.inspection import inspect

    failures: list[Exception] = []
    manifests, golden, stamp, kernels = (toolkit(name) for name in ("manifest", "golden", "stamp", "kernel_files"))
    trt_error = toolkit("errors").TrtError
    for step in (
        lambda: golden.read_golden(folder / "device" / "golden", manifests.read_manifest(folder)),
        lambda: stamp.read_stamp(folder / "engine" / "sm87-trt10.3.0"),
        lambda: kernels.read_index(folder / "kernels"),
        lambda: inspect(folder),
    ):
        try:
            step()
        except (trt_error, MixtError) as error:
            failures.append(error)
    if failures:
        raise MixtError(str(failures[0]))


def read_encoder(folder: Path) -> None:
    from mixt_export.inspection import inspect
    from mixt_export.runtime import load_runtime

    runtime: Any = load_runtime("ort_encoder")
    try:
        runtime._manifest(folder)
    except runtime.EncoderError as error:
        raise MixtError(str(error)) from None
    inspect(folder)


def read_notes(folder: Path) -> None:
    """Files of our own that a user keeps: constants of a device, a sweep."""
    from mixt_export.calibration.store import load_device
    from mixt_export.sweep.record import Record

    load_device(folder / "device.json")
    Record.open(folder / "sweep", {"method": "mixt"}, overwrite=False)


def _dense(folder: Path) -> None:
    write_tiny(folder, **_SMALL)


def _sharded(folder: Path) -> None:
    write_tiny(folder, shards=2, dtype="bfloat16", **_SMALL)


def _qwen2(folder: Path) -> None:
    write_tiny(folder, "qwen2", tied=False, dtype="float16", **_SMALL)


def _low_rank(folder: Path) -> None:
    write_tiny_low_rank(folder, write_tiny(folder.parent / f"{folder.name}-base", **_SMALL), 4)


def _mixt(folder: Path) -> None:
    write_tiny_mixt(folder, write_tiny(folder.parent / f"{folder.name}-base", **_SMALL), 2)


def _pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    write_tiny(folder, **_SMALL)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _whole(folder: Path) -> None:
    """A module saved whole, with the factors of SVD-LLM in one linear, one of them a view."""
    import torch
    from safetensors.torch import load_file

    write_tiny(folder, **_SMALL)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    linear = "model.layers.0.mlp.down_proj"
    rows, columns = tensors.pop(f"{linear}.weight").shape
    tensors |= {
        f"{linear.replace('_proj', '_u_proj')}.weight": torch.ones(rows, 4),
        f"{linear.replace('_proj', '_v_proj')}.weight": torch.ones(columns, 4).t(),
    }
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(tensor))
    torch.save({"model": root, "tokenizer": None}, folder / "model.pt")


def _adapter(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    write_tiny(folder / "base", **_SMALL)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4, "use_rslora": False}
    settings |= {"alpha_pattern": {"layers.0.self_attn.o_proj": 8}, "rank_pattern": {}, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    parts = {"A": (2, 32), "B": (32, 2)}
    stem = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    save_file({f"{stem}{part}.weight": torch.ones(shape) for part, shape in parts.items()}, folder / _ADAPTER)


def _ort(folder: Path) -> None:
    from mixt_export.targets import export

    export(write_tiny(folder.parent / f"{folder.name}-base", **_SMALL), folder, verify=False)


def _trt(folder: Path) -> None:
    from mixt_export.targets import export
    from mixt_export.targets.trt import TrtOptions

    base = write_tiny(folder.parent / f"{folder.name}-base", **_SMALL)
    export(base, folder, target="trt", max_seq_len=64, trt=TrtOptions(jetpack=6, max_input_len=16), verify=False)
    manifest = json.loads((folder / "mixt_manifest.json").read_text())
    golden = folder / "device" / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    case = {"name": "one", "tokens": [1, 2, 3, 4], "prompt": 2}
    facts = {"schema": 1, "graph": manifest["files"]["model.onnx"]["sha256"], "reference": "torch", "cases": [case]}
    (golden / "golden.json").write_text(json.dumps({**facts, "tolerance": {"logits": 1e-4, "norms": 1e-4}}))
    for name, shape in (("logits", (3, manifest["vocab_size"])), ("hidden", (1, 4)), ("cache", (1, 2, 4))):
        np.save(golden / f"one.{name}.npy", np.ones(shape, np.float32))
    engine = folder / "engine" / "sm87-trt10.3.0"
    engine.mkdir(parents=True)
    stamp = {"schema": 1, "backend": "trt", "library": "10.3.0", "sm": 87, "graph": facts["graph"], "layer_outputs": []}
    stamp |= {
        "profiles": manifest["trt"]["profiles"],
        "engine": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
    }
    (engine / "stamp.json").write_text(json.dumps(stamp))
    kernels = folder / "kernels"
    kernels.mkdir(exist_ok=True)
    kernel = {"file": "a.ptx", "sha256": hashlib.sha256(b"x").hexdigest(), "entry": "a", "threads": 128, "shared": 0}
    (kernels / "index.json").write_text(json.dumps({"schema": 1, "operators": ["MixT"], "kernels": {"a": kernel}}))


def _encoder(folder: Path) -> None:
    folder.mkdir()
    facts = {"schema": 1, "kind": "encoder", "limits": {"max_seq_len": 64}, "model": {"hidden_size": 32, "layers": 1}}
    facts |= {"files": {}, "outputs": {"sentence_embedding": "mean"}, "linears": {}, "memory": {"weight_bytes": 1}}
    (folder / "mixt_manifest.json").write_text(json.dumps(facts))


def _notes(folder: Path) -> None:
    from mixt_export.plan.cost import CPU

    (folder / "sweep").mkdir(parents=True)
    facts = {"schema": 1, "cpu": "c", "onnxruntime": "1", "threads": 1, "operators": 9}
    facts |= {"median_error": 0.1, "within_20_percent": 0.9}
    (folder / "device.json").write_text(json.dumps({**facts, "device": CPU.as_dict()}))
    sweep = {"format": "mixt-sweep", "version": 1, "settings": {"method": "mixt"}, "rows": []}
    (folder / "sweep" / "sweep.json").write_text(json.dumps(sweep))


_ADAPTER = "adapter_model.safetensors"
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json")

SURFACES: tuple[Surface, ...] = (
    Surface("dense", _dense, read_model, _documented, _COMPANIONS),
    Surface("sharded", _sharded, read_model, _documented, _COMPANIONS),
    Surface("untied with biases", _qwen2, read_model, _documented, _COMPANIONS),
    Surface("low rank", _low_rank, read_model, _documented, _COMPANIONS),
    Surface("tensor mixture", _mixt, read_model, _documented, _COMPANIONS),
    Surface("pickled", _pickled, read_model, _documented, _COMPANIONS),
    Surface("module saved whole", _whole, read_model, _documented, _COMPANIONS),
    Surface("adapter", _adapter, read_adapter, _documented, ("config.json", "model.safetensors", *_COMPANIONS)),
    Surface("exported", _ort, read_ort, _documented, ("model.safetensors", "model.onnx.data")),
    Surface("exported for TensorRT", _trt, read_trt, _documented, ("model.onnx", "model.onnx.data", *_COMPANIONS)),
    Surface("exported encoder", _encoder, read_encoder, _documented),
    Surface("notes", _notes, read_notes, _documented, named=("device.json", "sweep/sweep.json")),
)


@cache
def pristine(name: str, scratch: Path) -> Files:
    """The files of the surface ``name`` by relative path, made once below ``scratch``.

    They are read once as they are: that must work, and what is imported only then is no part of any case.
    """
    surface = next(surface for surface in SURFACES if surface.name == name)
    folder = scratch / f"seed-{name.replace(' ', '-')}"
    surface.make(folder)
    surface.read(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "device/mixt_trt" not in str(path) and path.suffix not in (".py", ".md")
    }
