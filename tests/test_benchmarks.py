"""benchmarks.run runs every benchmark: all modules there with a main, but those that it cannot run alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks.run import ALL

#: run itself, what needs files that are not part of this project, models to be named or a GPU, and a look behind a
#: result of planner.
APART = {"run", "make_texts", "planner_floor", "balance", "kernels_on_gpu"}


def test_every_benchmark_is_listed_once() -> None:
    folder = Path(__file__).parent.parent / "benchmarks"
    runnable = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert len(set(ALL)) == len(ALL)
    assert runnable - APART == set(ALL)
