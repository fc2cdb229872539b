"""run.py: the tokens are those of the ONNX Runtime runner, however the cache is held."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixt_export.building.toolkit import toolkit
from mixt_export.runtime import load_runtime
from mixt_export.targets import export
from tests.runtimes_trt.conftest import MAX_INPUT_LEN, MAX_SEQ_LEN
from tests.runtimes_trt.fake_tensorrt import fake_tensorrt

PROMPT = [11, 250, 3, 77, 77, 190, 8]


@pytest.fixture(scope="session")
def ort_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    out = tmp_path_factory.mktemp("ort") / "out"
    export(tiny_model, out, target="ort", max_seq_len=MAX_SEQ_LEN, verify=False)
    return load_runtime("ort").Model(out, threads=1)


def ids_of(text: str) -> list[int]:
    return [int(word) for word in text.strip().split(",")]


@pytest.mark.parametrize("profiles", ["one", "two"])
@pytest.mark.parametrize("options", [[], ["--cuda-graph"]], ids=["plain", "graph"])
@pytest.mark.parametrize("length", [1, len(PROMPT), 2 * MAX_INPUT_LEN + 5], ids=["one", "short", "pieces"])
def test_greedy_tokens_are_those_of_onnx_runtime(
    folder: Path,
    board: Any,
    capsys: pytest.CaptureFixture[str],
    ort_model: Any,
    profiles: str,
    options: list[str],
    length: int,
) -> None:
    prompt = (PROMPT * 20)[:length]
    device = board()
    assert device("build_engine", folder, "--profiles", profiles) == 0
    capsys.readouterr()
    words = ",".join(map(str, prompt))
    assert device("run", folder, "--ids", words, "--max-tokens", 500, *options) == 0
    found = capsys.readouterr()
    # 500 tokens do not fit: both runners go on to the last position, through every width of the window.
    assert ids_of(found.out) == list(ort_model.generate(prompt, 500)) and len(ids_of(found.out)) > 80
    assert "tok/s" in found.err and "device memory" in found.err
    assert (device.cudart.launches > 50) == bool(options)


@pytest.mark.parametrize(("jetpack", "dtype"), [(6, "fp32"), (7, "fp32"), (7, "fp16")])
def test_mixt_run_runs_the_very_same_graph(
    tmp_path: Path, exports: Any, board: Any, capsys: pytest.CaptureFixture[str], jetpack: int, dtype: str
) -> None:
    folder = shutil.copytree(exports(jetpack, dtype), tmp_path / "out")
    device = board("10.16")
    device("build_engine", folder)
    capsys.readouterr()
    assert device("run", folder, "--ids", ",".join(map(str, PROMPT)), "--max-tokens", 20) == 0
    model = load_runtime("ort").Model(folder, threads=1)
    assert ids_of(capsys.readouterr().out) == list(model.generate(PROMPT, 20))


def test_sampling_is_that_of_onnx_runtime(
    folder: Path, board: Any, capsys: pytest.CaptureFixture[str], ort_model: Any
) -> None:
    device = board()
    device("build_engine", folder)
    capsys.readouterr()
    words = ",".join(map(str, PROMPT))
    how = ("--temperature", 0.9, "--top-p", 0.8, "--top-k", 40, "--seed", 5, "--repetition-penalty", 1.2)
    assert device("run", folder, "--ids", words, "--max-tokens", 30, *how) == 0
    sampler = load_runtime("ort").Sampler(0.9, 0.8, 40, 5, 1.2)
    assert ids_of(capsys.readouterr().out) == list(ort_model.generate(PROMPT, 30, sampler))


def test_text_in_text_out(folder: Path, board: Any, capsys: pytest.CaptureFixture[str], ort_model: Any) -> None:
    device = board()
    device("build_engine", folder)
    capsys.readouterr()
    tokenizer = load_runtime("ort").Tokenizer(folder)
    for options, ids in (
        ([], tokenizer.encode("Hello")),
        (["--chat"], tokenizer.encode_chat([{"role": "user", "content": "Hello"}])),
    ):
        assert device("run", folder, "-p", "Hello", "--max-tokens", 12, *options) == 0
        stream = tokenizer.stream()
        expected = "".join(stream.push(token) for token in ort_model.generate(ids, 12)) + stream.finish()
        assert capsys.readouterr().out == expected + "\n"


def test_without_graph_capture_it_decodes_plainly(folder: Path, board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ",".join(map(str, PROMPT))
    outputs = []
    for capturable in (True, False):
        device = board(capturable=capturable)
        device("build_engine", folder)
        capsys.readouterr()
        assert device("run", folder, "--ids", words, "--cuda-graph", "--max-tokens", 40) == 0
        said = capsys.readouterr()
        outputs.append(said.out)
        assert ("decoding without a CUDA graph" in said.err) == (not capturable)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_cut_cache_goes_on_like_a_fresh_one(folder: Path, board: Any, cuda_graph: bool) -> None:
    device = board()
    device("build_engine", folder)
    module = fake_tensorrt("10.3", device.cudart)
    cuda = toolkit("cuda").Cuda(device.cudart)
    manifest = toolkit("manifest").read_manifest(folder)
    backend = toolkit("backends").BACKENDS["trt"]

    def decoder() -> Any:
        engine = toolkit("engine").Engine(manifest, backend, module, cuda)
        return toolkit("decoder").Decoder(manifest, engine, cuda_graph=cuda_graph)

    used, fresh = decoder(), decoder()
    used.prefill([PROMPT * 3])
    for token in (5, 6, 7, 8, 9):
        used.step([token])
    used.truncate(4)
    assert used.length == 4
    for tokens in (PROMPT, [42], [43]):
        expected = fresh.prefill([(PROMPT[:4] if fresh.length == 0 else []) + tokens])
        assert np.allclose(used.prefill([tokens]), expected, atol=1e-5)
    assert np.allclose(used.cache_norms(), fresh.cache_norms(), atol=1e-5)
    with pytest.raises(toolkit("errors").TrtError, match="cannot cut a cache of 13 tokens to 14"):
        used.truncate(14)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ids", "1", "--chat"], "--chat wraps text"),
        (["--ids", "1,x"], "give numbers separated by commas"),
        (["--ids", "1,300"], "300 is not a token id from 0 to 299"),
        (["--ids", ",".join(["1"] * (MAX_SEQ_LEN + 1))], f"was exported for at most {MAX_SEQ_LEN}"),
        (["--ids", "1", "--max-tokens", "0"], "--max-tokens 0"),
        (["--ids", "1", "--top-p", "7"], "top_p is 7.0"),
    ],
)
def test_bad_requests(
    folder: Path, board: Any, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    device = board()
    device("build_engine", folder)
    capsys.readouterr()
    assert device("run", folder, *words) == 2
    assert said in capsys.readouterr().err


def test_too_little_device_memory(folder: Path, board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    device = board(total=20_000)
    device("build_engine", folder)
    assert device("run", folder, "--ids", "1,2") == 5
    assert "out of device memory" in capsys.readouterr().err


def test_no_tensorrt_here(
    folder: Path, scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for name, words in (("build_engine", []), ("check_parity", []), ("run", ["--ids", "1"])):
        assert scripts[name].main([str(folder), *words]) == 6
        assert "TensorRT" in capsys.readouterr().err
