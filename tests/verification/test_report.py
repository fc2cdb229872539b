from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

from mixt_export.verification import CheckResult, Report, VerifyOptions, verify
from mixt_export.verification.html import layer_chart, number, render, size
from mixt_export.verification.report import SCHEMA_FILE, LayerError, write_whole
from tests.verification.handmade import write_handmade

SCHEMA = json.loads(SCHEMA_FILE.read_text())
HOSTILE = "</td><script>alert(1)</script>\"'&{{ 7*7 }}"


@pytest.fixture(scope="module")
def report(model: Path, exported: Path) -> Report:
    options = VerifyOptions(positions=20, greedy_tokens=3, memory=False, threads=1)
    return verify(exported, model, options=options)


def test_report_is_written_and_obeys_its_schema(report: Report, exported: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    written = json.loads((exported / "report.json").read_text())
    jsonschema.validate(written, SCHEMA)
    assert written == report.to_json()
    assert written["passed"] is True
    assert not list(exported.glob(".report*"))


def test_schema_refuses_what_a_report_must_not_be(report: Report) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    good = report.to_json()
    for change in ({"passed": "yes"}, {"schema_version": 2}, {"extra": 1}, {"checks": []}, {"tolerance": 0}):
        assert not validator.is_valid({**good, **change})
    silent = {**good["checks"][0], "passed": False}
    assert not validator.is_valid({**good, "checks": [silent]})


def test_a_failed_report_with_nan_is_still_strict_json(model: Path, tmp_path: Path) -> None:
    broken = write_handmade(tmp_path / "broken", model, faults={"nan": 0})
    failed = verify(broken, model, options=VerifyOptions(positions=20, greedy_tokens=3, memory=False, threads=1))
    text = (broken / "report.json").read_text()
    jsonschema.validate(json.loads(text, parse_constant=pytest.fail), SCHEMA)
    assert json.loads(text)["first_diverging_layer"] == "model.layers.0"
    assert "failed" in (broken / "report.html").read_text()
    assert not failed.passed


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(report: Report) -> _Tags:
    parser = _Tags()
    parser.feed(render(report))
    return parser


def test_html_shows_hostile_names_as_text(report: Report) -> None:
    check = CheckResult("teacher_forced", HOSTILE, False, HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
    layer = LayerError(HOSTILE, 0.1, 0.01)
    nasty = replace(report, exported=HOSTILE, reference=HOSTILE, checks=[check], layers=[layer], notes=[HOSTILE])
    page = parsed(nasty)
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>") >= 7
    assert "{{ 7*7 }}" in page.text


def test_html_loads_nothing_and_draws_every_block(report: Report) -> None:
    page = parsed(report)
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action"}
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(" not in render(report)
    assert page.tags.count("rect") == len(report.layers) == 3
    assert "prefers-color-scheme: dark" in render(report)
    opened = re.findall(r"<(table|div|details|tr|td|svg)\b", render(report))
    closed = re.findall(r"</(table|div|details|tr|td|svg)>", render(report))
    assert sorted(opened) == sorted(closed)


def test_html_shows_memory_and_dtype_cost(model: Path, tmp_path: Path) -> None:
    folder = write_handmade(tmp_path / "half", model, dtype="float16")
    half = verify(folder, model, options=VerifyOptions(positions=20, greedy_tokens=3, memory=False, threads=1))
    text = parsed(half).text
    assert "PyTorch float32 and PyTorch float16 differ" in text
    assert "Predicted from the graph" in text
    assert half.memory is not None
    assert size(half.memory.decode.weights) in text
    jsonschema.validate(half.to_json(), SCHEMA)


def test_chart_places_errors_on_a_logarithmic_axis() -> None:
    chart = layer_chart([LayerError("a", 1e-6, 1e-5), LayerError("b", 1e-3, 1e-5), LayerError("c", math.inf, 1e-5)])
    assert chart is not None
    low, high, infinite = chart.bars
    assert low.y > low.threshold_y > high.y > infinite.y - 1e-9
    assert [bar.diverges for bar in chart.bars] == [False, True, True]
    assert [label for _, label in chart.ticks] == ["1e-6", "1e-5", "1e-4", "1e-3"]
    assert layer_chart([]) is None


def test_numbers_and_sizes() -> None:
    assert [number(value) for value in (1.0, 0.9999999, 0.99953)] == ["1", "0.999999", "0.999530"]
    assert [number(value) for value in (None, 3, 0.5, 1.25e-7, math.inf, "text", 0.0)] == [
        "–", "3", "0.5", "1.25e-07", "inf", "text", "0",
    ]  # fmt: skip
    assert [size(value) for value in (999, 123_456, 5_400_000)] == ["1.0 kB", "0.1 MB", "5.4 MB"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "old")

    def fail(*_arguments: object) -> None:
        raise OSError

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError):
        write_whole(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"
