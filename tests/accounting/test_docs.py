"""docs/mixt-accounting.md says what the command says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixt_export.accounting import Request, account, open_source, presets
from mixt_export.cli.inspect import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mixt-accounting.md"
RESULT = ROOT / "benchmarks" / "results" / "mixt_memory.json"

CASES = ["mixt inspect --as llama2-7b --method mixt --blocks last:17 --n-tensors 4 --paper-padding"]

SIZES = [
    ("llama2-7b", 17, (3, 4, 5)),
    ("qwen3-8b", 11, (3, 4, 5)),
    ("smollm2-135m", 4, (2, 3, 4)),
    ("smollm2-135m", 15, (2, 3, 4)),
]


def size_rows() -> list[str]:
    """The table of sizes: parameters of a replaced block and of the model, multiply-adds of a block."""
    rows = [
        "| model | blocks | N_T | block, padded | block, exact | model, padded | model, exact | block's multiply-adds, "
        "all padding | exact |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for preset, blocks, counts in SIZES:
        for terms in counts:
            request = Request(blocks=f"last:{blocks}", n_tensors=(terms, []), paper_padding=True)
            report = account(open_source(preset), "mixt", request)
            dense, padded, exact = report["variants"][:3]
            cells = [preset, str(blocks), str(terms)]
            cells += [f"{v['blocks'][-1]:,} ({v['blocks'][-1] / dense['blocks'][-1]:.2%})" for v in (padded, exact)]
            total = dense["parameters"]["total"]
            cells += [f"{_params(v):,} ({_params(v) / total - 1:+.2%})" for v in (padded, exact)]
            before = dense["forms"]["dense"]["block_macs"][-1]
            forms = padded["forms"]["branches, all padding"], exact["forms"]["branches"]
            cells += [f"{form['block_macs'][-1] / before:.1%}" for form in forms]
            rows.append(f"| {' | '.join(cells)} |".replace("-", "−").replace(preset.replace("-", "−"), preset))
    return rows


#: Rows of the measured table: what a run's section and key say, and their name among its changes.
MEMORY = {
    "predicted from the architecture": ("predicted from the architecture", "total"),
    "predicted from the graph": ("predicted from the graph", "sum"),
    "measured, ran": ("measured", "ran"),
    "measured, peak": ("measured", "peak"),
}
LABELS = {"measured, ran": "measured, growth over the imports", "measured, peak": "measured, peak of the process"}


def memory_rows() -> list[str]:
    """The measured table, from the benchmark's result; MB are 10^6 bytes."""
    result: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    runs = {name: run for name, run in result.items() if isinstance(run, dict) and "measured" in run}
    rows = [f"| MB | {' | '.join(runs)} |", "|---" * (1 + len(runs)) + "|"]
    decoder = open_source(result["preset"]).decoder
    unread = 4 * decoder.vocab_size * decoder.hidden_size
    cells = ["the same without the embedding, of which few rows are read"]
    before = 0.0
    for run in runs.values():
        size = run["predicted from the architecture"]["total"] - unread
        change = f" ({100 * (size / before - 1):+.1f} %)".replace("-", "−") if before else ""
        before = before or size
        cells.append(f"{size / 1e6:,.0f}{change}")
    without = f"| {' | '.join(cells)} |"
    for name, (section, key) in MEMORY.items():
        cells = [LABELS.get(name, name)]
        for run in runs.values():
            change = f" ({run['change %'][name]:+.1f} %)".replace("-", "−") if "change %" in run else ""
            cells.append(f"{run[section][key] / 1e6:,.0f}{change}")
        rows.append(f"| {' | '.join(cells)} |")
    rows.insert(3, without)
    return rows


def _params(variant: dict[str, Any]) -> int:
    found: int = variant["parameters"]["total"]
    return found


def shown(command: str) -> str:
    """The page's console block of ``command``, the command itself left out."""
    match = re.search(rf"```console\n\$ {re.escape(command)}\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None, f"{PAGE.name} does not show {command}"
    return match.group(1)


@pytest.mark.parametrize("command", CASES)
def test_the_page_shows_what_the_command_prints(command: str) -> None:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, command.split()[2:], catch_exceptions=False)
    assert shown(command) == "\n".join(line.rstrip() for line in result.stdout.splitlines())


@pytest.mark.parametrize("rows", [size_rows, memory_rows])
def test_tables_are_the_computed_ones(rows: Any) -> None:
    assert "\n".join(rows()) in PAGE.read_text(encoding="utf-8")


def test_the_page_lists_the_presets() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"Presets: {', '.join(presets())}." in text


def test_every_command_of_the_page_is_checked() -> None:
    commands = re.findall(r"```console\n\$ (.*)\n", PAGE.read_text(encoding="utf-8"))
    assert commands == CASES
