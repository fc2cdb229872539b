"""A folder with our genai_config.json in onnxruntime-genai itself: same greedy tokens as our runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import pytest

from mixt_export.errors import CheckpointError
from mixt_export.runtime import load_runtime
from mixt_export.targets.genai import genai_config
from tests.runtimes.build_tiny import Shape, hf_config, write_folder

SHAPE = Shape()
PAD = 258


def make(folder: Path, dialect: str, **generation: Any) -> Path:
    """A tiny folder of ``dialect`` with genai_config.json."""
    write_folder(folder, dialect, SHAPE, seed=2)
    manifest = json.loads((folder / "mixt_manifest.json").read_text())
    config = genai_config(manifest, hf_config(SHAPE), {"pad_token_id": PAD, **generation})
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["ort", "portable"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("genai"), request.param)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + 1000 * length).integers(0, 256, length).tolist()


def generate(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy tokens of onnxruntime-genai for equally long ``prompts``; the end token included."""
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompts[0]) + new, batch_size=len(prompts))
    generator = genai.Generator(model, params)
    generator.append_tokens(np.asarray(prompts, np.int32))
    rows: list[list[int]] = [[] for _ in prompts]
    while not generator.is_done():
        generator.generate_next_token()
        for row, token in zip(rows, generator.get_next_tokens(), strict=True):
            row.append(int(token))
    return rows


def ours(folder: Path, ids: list[int], new: int) -> list[int]:
    """Greedy tokens of our runtime, the end token included."""
    generation = load_runtime("ort").Model(folder, threads=1).generate(ids, new)
    tokens = list(generation)
    return [*tokens, 257] if generation.finish_reason == "stop" else tokens


@pytest.mark.parametrize("length", [1, 2, 9, 400])
def test_same_greedy_tokens(folder: Path, length: int) -> None:
    """(batch, 1, vocab) logits at prefill must be read as the last token's, for short and long prompts."""
    ids = prompt(length)
    assert generate(folder, [ids], 24) == [ours(folder, ids, 24)]


def test_pad_token_inside_a_single_prompt_is_a_token(folder: Path) -> None:
    ids = [*prompt(5), PAD, *prompt(4), PAD]
    assert generate(folder, [ids], 12) == [ours(folder, ids, 12)]


def test_continued_prompt(folder: Path) -> None:
    ids = prompt(20)
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=30)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.asarray([ids[:12]], np.int32))
    generator.append_tokens(np.asarray([ids[12:]], np.int32))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == ours(folder, ids, 10)


def test_ragged_batch_in_the_ort_dialect(tmp_path: Path) -> None:
    folder = make(tmp_path, "ort")
    prompts = [prompt(9), prompt(3), prompt(5)]
    padded = [ids + [PAD] * (9 - len(ids)) for ids in prompts]
    for found, ids in zip(generate(folder, padded, 8), prompts, strict=True):
        expected = ours(folder, ids, 8)
        assert found[: len(expected)] == expected


def test_values_come_from_the_right_file() -> None:
    manifest = {
        "kv": {"layers": 3, "heads": 2, "head_dim": 16, "shared_buffer": False},
        "limits": {"max_seq_len": 99},
        "vocab_size": 50,
        "eos_token_ids": [4, 7],
        "bos_token_id": 3,
    }
    hf = {"model_type": "olmo2", "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 9, "num_hidden_layers": 8}
    config = genai_config(manifest, hf, {"do_sample": True, "top_p": 0.9, "temperature": 2, "top_k": None})
    model, search = config["model"], config["search"]
    assert model["type"] == "decoder"
    assert model["decoder"]["num_hidden_layers"] == 3
    assert (model["decoder"]["hidden_size"], model["decoder"]["num_attention_heads"]) == (64, 4)
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([4, 7], 3, 9)
    assert model["context_length"] == search["max_length"] == 99
    assert search["past_present_share_buffer"] is False
    assert (search["do_sample"], search["top_p"], search["temperature"], search["top_k"]) == (True, 0.9, 2, 50)


@pytest.mark.parametrize(("matrix", "expected"), [({"activations": "call"}, "1"), ({"bits": 4}, None)])
def test_products_of_integers_are_asked_to_be_exact(matrix: dict[str, object], expected: str | None) -> None:
    manifest = {
        "kv": {"layers": 1, "heads": 2, "head_dim": 16, "shared_buffer": True},
        "limits": {"max_seq_len": 99},
        "vocab_size": 50,
        "eos_token_ids": [],
        "bos_token_id": None,
        "quantisation": {"matrices": {"m": matrix}},
    }
    config = genai_config(manifest, {"hidden_size": 64, "num_attention_heads": 4}, None)
    assert config["model"]["decoder"]["session_options"].get("session.x64quantprecision") == expected


def test_nothing_is_invented(tmp_path: Path) -> None:
    """Without any special token the ids are left out, and genai still runs."""
    write_folder(tmp_path, "ort", SHAPE, eos_token_ids=[], bos_token_id=None)
    manifest = json.loads((tmp_path / "mixt_manifest.json").read_text())
    config = genai_config(manifest, {**hf_config(SHAPE), "eos_token_id": None}, None)
    assert not {"eos_token_id", "bos_token_id", "pad_token_id"} & set(config["model"])
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    ids = prompt(6)
    assert generate(tmp_path, [ids], 10) == [ours(tmp_path, ids, 10)]


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads"])
def test_config_without_a_size(name: str) -> None:
    manifest = {"kv": {"layers": 1, "heads": 1, "head_dim": 16}, "limits": {"max_seq_len": 9}, "vocab_size": 5}
    hf = hf_config(SHAPE)
    del hf[name]
    with pytest.raises(CheckpointError, match=f"{name} is None"):
        genai_config(manifest, hf, None)
