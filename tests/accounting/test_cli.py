"""mixt inspect --as: tables, JSON, and one sentence for everything that cannot be counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixt_export.accounting import Request, account, open_source
from mixt_export.cli.inspect import app
from mixt_export.errors import CheckpointError, MixtError, UnsupportedError, UsageError
from tests.tiny import tiny_config, write_tiny


def printed(*options: str) -> str:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, list(options), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def refused(*options: str) -> MixtError:
    result = CliRunner().invoke(app, list(options))
    assert isinstance(result.exception, MixtError)
    return result.exception


def test_json_is_the_report() -> None:
    options = ("--as", "SmolLM2-135M", "--method", "mixt", "--blocks", "last:2", "--n-tensors", "2", "--seq", "64")
    request = Request(blocks="last:2", n_tensors=(2, []))
    assert json.loads(printed(*options, "--json")) == account(open_source("smollm2-135m"), "mixt", request, seq=64)


def test_tables() -> None:
    text = printed("--as", "smollm2-135m", "--method", "mixt", "--blocks", "0,5-7", "--n-tensors", "3")
    rows = [line.split() for line in text.splitlines()]
    assert ["mixt", "in", "4", "blocks:", "0,", "5–7"] in rows
    assert ["change", "−8.55", "%", "−8.56", "%"] in rows
    assert ["mixt", "branches", "2.65", "M", "75.00", "%", "0.1309", "G", "−2.63", "%", "94,666,752"] in rows
    assert "paper" not in text
    assert "low rank" not in printed("--as", "smollm2-135m")


def test_the_papers_table_appears_for_its_configuration_only() -> None:
    source = open_source("llama2-7b")
    the_papers, wider = Request(blocks="15-31", paper_padding=True), Request(blocks="last:17", n_tensors=(3, []))
    rows = account(source, "mixt", the_papers)["paper"]
    assert [row["reported"] for row in rows if row["quantity"] == "inference memory"] == [[46.94, 18.59]]
    assert "paper" not in account(source, "mixt", wider)
    assert "paper" not in account(source, "mixt", Request(blocks="16-31"))


def test_a_config_file_and_a_model_folder(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen2", tied=False)
    (tmp_path / "alone.json").write_text(json.dumps(tiny_config("qwen2", tied=False)))
    by_folder, by_file = (
        account(open_source(str(path)), None, Request()) for path in (folder, tmp_path / "alone.json")
    )
    assert by_folder["variants"] == by_file["variants"]
    assert by_folder["model"]["source"] == "config"
    from mixt_export.inspection import inspect

    stored = inspect(folder)
    assert by_folder["variants"][0]["parameters"]["total"] == stored["params"]["total"]
    assert by_folder["kv_bytes_per_token"] == stored["kv_bytes_per_token"]


MIXT = ("--as", "smollm2-135m", "--method", "mixt")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "name a model folder or an exported folder, or --as"),
        (("--blocks", "all"), "--blocks counts without weights and needs --as"),
        (("folder", "--as", "llama2-7b"), "not both"),
        (("--as", "llama9"), r"presets are llama2-13b, llama2-7b, .*tinyllama-1.1b"),
        (("--as", "smollm2-135m", "--method", "tucker"), "only mixt and svd can be counted"),
        (("--as", "smollm2-135m", "--bond", "2"), "--bond needs --method mixt"),
        (("--as", "smollm2-135m", "--method", "svd", "--n-tensors", "2"), "--n-tensors needs --method mixt"),
        (("--as", "smollm2-135m", "--seq", "0"), "--seq 0: give a number from 1"),
        (("--as", "smollm2-135m", "--batch", "99999999999"), "--batch 99999999999: give a number from 1"),
        ((*MIXT, "--blocks", "last:31"), "give last:1 to last:30"),
        ((*MIXT, "--n-tensors", "8"), r"2\^7 = 128 does not divide .*576 → 576.*N_T from 2 to 7 fits all, or --paper"),
        ((*MIXT, "--n-tensors", "12", "--paper-padding"), "does not fit into the padded .*N_T from 2 to 9 fits all"),
        ((*MIXT, "--n-tensors", "qproj=2"), "--n-tensors qproj=…: matches none of the 28 chosen linears"),
        ((*MIXT, "--n-tensors", "1"), "MixT has 2 to 32 tensors"),
        ((*MIXT, "--bond", "1"), "--bond 1: the local dimension is at least 2"),
        ((*MIXT, "--bond", "7"), r"7\^3 = 343 does not divide .*; --paper-padding pads the features"),
        ((*MIXT, "--keep", "0"), "--keep 0.0: give the share"),
    ],
)
def test_refused(options: tuple[str, ...], sentence: str) -> None:
    error = refused(*options)
    assert isinstance(error, UsageError)
    with pytest.raises(UsageError, match=sentence):
        raise error


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers", "model_type"])
def test_missing_keys_name_the_file(tmp_path: Path, key: str) -> None:
    config = tiny_config()
    del config[key]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(config))
    error = refused("--as", str(path))
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"{path}: {key} is missing")


def test_unknown_families_and_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(model_type="llama") | {"model_type": "mamba"}))
    error = refused("--as", str(tmp_path))
    assert isinstance(error, UnsupportedError)
    assert "model_type 'mamba' is not supported" in str(error)
    path.write_text('{"model_type": NaN}')
    assert isinstance(refused("--as", str(path)), CheckpointError)


def test_numpy_is_enough() -> None:
    code = (
        "import sys; from mixt_export.accounting import *; account(open_source('llama2-7b'), 'mixt', Request()); "
        "assert not {'torch', 'transformers', 'onnx', 'onnxruntime', 'onnx_ir'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)
