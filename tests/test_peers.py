"""The comparison with other engines: what it feeds them, and what it makes of what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import contenders, measure, report
from benchmarks.peers.gguf import permute_rows, write_gguf
from mixt_export.checkpoints import open_checkpoint
from mixt_export.sample.gguf_llama import GgufLlama, unpermute_rows
from tests.tiny import write_tiny


@pytest.mark.parametrize("heads", [1, 3, 9])
def test_permuted_rows_are_interleaved_halves(heads: int) -> None:
    weight = np.arange(heads * 8 * 5, dtype=np.float32).reshape(heads * 8, 5)
    permuted = permute_rows(weight, heads)
    # llama.cpp rotates rows (2i, 2i + 1) of a head, transformers rows (i, i + 4).
    np.testing.assert_array_equal(permuted[0:2], weight[[0, 4]])
    np.testing.assert_array_equal(permuted[-2:], weight[[-5, -1]])
    np.testing.assert_array_equal(unpermute_rows(permuted, heads), weight)


def test_the_file_for_llama_cpp_holds_the_model(tmp_path: Path) -> None:
    """Read back by the reader of the sample model, which was checked against transformers' own."""
    folder = write_tiny(tmp_path / "model", vocab_size=259)
    write_gguf(folder, tmp_path / "model.gguf", np.float32)
    stored, store = GgufLlama(tmp_path / "model.gguf"), open_checkpoint(folder).store
    sources = stored.sources()
    assert {source.name for source in sources} == set(store)
    for source in sources:
        np.testing.assert_array_equal(np.concatenate(list(stored.pieces(source))), store.read(source.name))
    assert stored.value("llama.rope.freq_base") == 10000.0
    assert stored.value("tokenizer.ggml.model") == "gpt2"


def _slices(seconds: list[float]) -> list[dict[str, Any]]:
    return [{part: {"cpu": s, "wall": 2 * s} for part in ("prefill", "decode")} for s in seconds]


def test_ratios_are_taken_within_a_round() -> None:
    """The second round is ten times slower for everybody: that must not show in the ratio."""
    samples = {"llama.cpp q4_0": _slices([2.0, 20.0, 2.0]), "ours": _slices([1.0, 10.0, 1.0])}
    speeds = {"engines": measure._rates(samples, "cpu")}
    assert measure.against(speeds, "llama.cpp q4_0")["ours"]["decode"]["median"] == 2.0
    assert speeds["engines"]["ours"]["busy"] == 0.5
    assert speeds["engines"]["ours"]["decode"]["tokens_per_s"] == measure.NEW


def _result() -> dict[str, Any]:
    base = contenders.LLAMA_Q4
    samples = {base: _slices([2.0] * 3), "ours dense int4": _slices([1.0] * 3)}
    speeds = {threads: {"engines": measure._rates(samples, "cpu")} for threads in ("1", "2")}
    row = {
        "engine": "ours",
        "files": {"file_mb": 98.2, "export": None},
        "perplexity": {"addresses": 26.5, "novel": 57.0},
        "memory": {"load_cpu_s": 0.2, "peak_rss_mb": 200.0},
    }
    return {
        "contenders": {
            base: {**row, "engine": "llama.cpp"},
            "ours dense int4": row,
            "GenAI int4": {"missing": "no wheel"},
        },
        "speed": speeds,
        "times llama.cpp q4_0": {threads: measure.against(found, base) for threads, found in speeds.items()},
    }


def test_the_table_names_what_is_missing_and_why() -> None:
    lines = report.table(_result()).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "no wheel" in next(line for line in lines if "GenAI" in line)
    assert "2.00 (2.00–2.00)" in next(line for line in lines if "ours" in line)


def test_the_page_keeps_what_is_outside_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    begin, end = report.marks("avx2")
    others = "\n".join([report.marks("amx")[0], "another processor's", report.marks("amx")[1]])
    page.write_text(f"before\n{others}\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(report, "PAGE", page)
    report.write(_result(), "avx2")
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{others}\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert (tmp_path / "peers_avx2.svg").is_file()
    with pytest.raises(ValueError, match="marks"):
        report.write(_result(), "neon")


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (("avx2", "avx512_vnni", "amx_int8"), "amx"),
        (("avx2", "avx_vnni"), "vnni"),
        (("avx", "avx2"), "avx2"),
        (("asimd", "i8mm"), "neon"),
        ((), "other"),
    ],
)
def test_kinds_of_processors(flags: tuple[str, ...], kind: str) -> None:
    assert report.kind_of(flags) == kind
