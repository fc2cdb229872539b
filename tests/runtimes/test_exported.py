"""The runtime and onnxruntime-genai on folders that the exporter itself wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import pytest

from mixt_export.targets import export
from tests.tiny import write_tiny


@dataclass(frozen=True)
class Exported:
    """One tiny model, exported once per dialect, and the runtime's models of it."""

    folders: dict[str, Path]
    models: dict[str, Any]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, rt: ModuleType) -> Exported:
    root = tmp_path_factory.mktemp("exported")
    source = write_tiny(root / "source", request.param, tied=request.param != "qwen3")
    folders = {target: root / target for target in ("ort", "onnx")}
    for target, folder in folders.items():
        export(source, folder, target=target, verify=False)
    return Exported(folders, {target: rt.Model(folder, threads=1) for target, folder in folders.items()})


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + 1000 * length).integers(0, 256, length).tolist()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_dialects_agree_in_every_way_of_running(exported: Exported) -> None:
    """Whole, in chunks, token by token, in a ragged batch: always the same logits (float32 rounding aside)."""
    rows = [prompt(31), prompt(12), prompt(1)]
    expected = [exported.models["ort"].prefill([row], exported.models["ort"].new_cache())[0] for row in rows]
    for model in exported.models.values():
        for row, whole in zip(rows, expected, strict=True):
            assert distance(model.prefill([row], model.new_cache())[0], whole) < 1e-5
            assert distance(model.prefill([row], model.new_cache(), chunk=5)[0], whole) < 1e-5
            assert distance(model.prefill([row], model.new_cache(), chunk=1)[0], whole) < 1e-5
        batch = model.new_cache(3)
        model.prefill([row[:-1] or row for row in rows[:2]] + [rows[2]], batch)
        logits = model.step([rows[0][-1], rows[1][-1], 7], batch)
        for row in range(2):
            assert distance(logits[row], expected[row]) < 1e-5


def test_genai_gives_the_same_greedy_tokens(exported: Exported) -> None:
    ours = exported.models["ort"]
    model = genai.Model(str(exported.folders["ort"]))
    for length in (1, 8, 100):
        ids = prompt(length, seed=1)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length + 16)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.asarray([ids], np.int32))
        found = []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        assert found == list(ours.generate(ids, 16, stop=()))[: len(found)]
        assert len(found) == 16 or found[-1] in ours.manifest.eos_token_ids


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_float16_folder(rt: ModuleType, tmp_path: Path, target: str) -> None:
    """Keys and values are float16, logits float32; chunks and steps agree with the whole to float16 accuracy."""
    export(write_tiny(tmp_path / "source"), tmp_path / "out", target=target, dtype="float16", verify=False)
    model = rt.Model(tmp_path / "out", threads=1)
    assert model.manifest.kv_dtype == "float16"
    ids = prompt(20)
    whole = model.prefill([ids], model.new_cache())[0]
    assert whole.dtype == np.float32
    cache = model.new_cache()
    model.prefill([ids[:10]], cache, chunk=3)
    for token in ids[10:]:
        stepped = model.step([token], cache)[0]
    assert distance(stepped, whole) < 1e-2
    assert cache.nbytes % model.manifest.kv_bytes_per_token == 0


def test_copied_runtime_is_this_runtime(exported: Exported, rt: ModuleType) -> None:
    for folder in exported.folders.values():
        assert (folder / "device" / "mixt_ort.py").read_bytes() == Path(str(rt.__file__)).read_bytes()
