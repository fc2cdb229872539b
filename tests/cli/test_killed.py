"""SIGKILL at any moment: what is there afterwards is whole, and the next run removes what was left lying about."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mixt_export.staging import clear_leftovers, staged_folder
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.killing import digests, engine_is_whole, killed, leftovers, write_plan
from tests.tiny import write_tiny


def _slow(output: Path, overwrite: bool) -> Callable[[], None]:
    def work() -> None:
        with staged_folder(output, overwrite=overwrite) as folder:
            for index in range(400):
                with (folder / f"{index}.bin").open("wb") as file:
                    file.write(b"x" * 20_000)
            (folder / "mixt_manifest.json").write_text("{}")

    return work


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_writer_leaves_the_output_absent_or_whole(tmp_path: Path, overwrite: bool) -> None:
    output = tmp_path / "out"
    work = _slow(output, overwrite)
    work()
    whole = digests(output)
    stopped = 0
    for seconds in np.random.default_rng(overwrite).uniform(0.0, 0.06, 6):
        if not overwrite:
            shutil.rmtree(output)
        stopped += not killed(work, float(seconds))
        clear_leftovers(output)
        assert leftovers(tmp_path) == []
        if overwrite:
            assert digests(output) == whole
        else:
            assert not output.exists() or digests(output) == whole
            work() if not output.exists() else None
    assert stopped  # else nothing was tested


def test_a_killed_export_leaves_nothing_or_everything(tmp_path: Path) -> None:
    model, output = write_tiny(tmp_path / "model"), tmp_path / "out"
    export(model, tmp_path / "reference", verify=False)
    expected = set(digests(tmp_path / "reference"))
    for seconds in np.random.default_rng(5).uniform(0.0, 0.3, 3):
        killed(lambda: export(model, output, verify=False) and None, float(seconds))
        assert not output.exists() or set(digests(output)) == expected
        shutil.rmtree(output, ignore_errors=True)
    export(model, output, verify=False)
    assert leftovers(tmp_path) == []
    assert set(digests(output)) == expected


def test_a_killed_build_leaves_no_half_engine(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = TrtOptions(jetpack=6, max_input_len=16)
    export(write_tiny(tmp_path / "model"), folder, target="trt", max_seq_len=64, trt=options, verify=False)
    plan = np.random.default_rng(0).bytes(8_000_000)
    for seconds in np.random.default_rng(6).uniform(0.0, 0.05, 3):
        killed(lambda: write_plan(folder, plan) and None, float(seconds))
        assert all(engine_is_whole(path) for path in (folder / "engine").glob("[!.]*"))
    assert engine_is_whole(write_plan(folder, plan))
    assert leftovers(folder / "engine") == []


def test_a_folder_that_is_being_written_stays(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staged_folder(output) as staging:
        (staging / "mixt_manifest.json").write_text("{}")
        clear_leftovers(output)
        assert staging.is_dir()
    assert output.is_dir()


def test_what_was_set_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    output, aside = tmp_path / "out", tmp_path / ".out.old-abcd1234"
    (aside / "out").mkdir(parents=True)
    (aside / "out" / "mixt_manifest.json").write_text("{}")
    (tmp_path / ".out.tmp-abcd1234" / "out").mkdir(parents=True)
    other = tmp_path / ".other.tmp-abcd1234"
    other.mkdir()
    clear_leftovers(output)
    assert (output / "mixt_manifest.json").is_file()
    assert leftovers(tmp_path) == [other.name]


def test_only_what_was_set_aside_is_put_back(tmp_path: Path) -> None:
    """A half-written folder may hold one of the output's own name."""
    output = tmp_path / "device"
    (tmp_path / ".device.tmp-abcd1234" / "device").mkdir(parents=True)
    clear_leftovers(output)
    assert not output.exists()
    assert leftovers(tmp_path) == []
