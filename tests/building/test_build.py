"""`mixt build` and what it says when a build cannot be had; the process it starts is put in by the tests."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mixt_export.building.build as building
from mixt_export.building import build_engine, installed_backend
from mixt_export.cli.guard import guarded
from mixt_export.cli.main import load_verb
from mixt_export.errors import MissingDependencyError, MixtError, ResourceError, UnsupportedError, UsageError
from mixt_export.targets import export
from tests.tiny import write_tiny

FACTS = (
    '{"engine": "/e", "claim": "c", "library": "1", "sm": 86, "bytes": 9, "layers": 3, "seconds": 0.5, '
    '"log_memory": {"weights_bytes": 7, "profiles": []}, "kernels": "no kernels"}'
)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``process(code)``: the build script is replaced by this Python code."""

    def put(code: str) -> None:
        (tmp_path / "build_engine.py").write_text(f"import os, sys, signal\n{code}\n")
        monkeypatch.setattr(building, "bundle_folder", lambda: tmp_path)

    return put


def test_the_report_is_the_last_event(process: Any) -> None:
    process(f"print('a library speaks'); print('{{\"phase\": \"x\"}}'); print('[1]'); print('''{FACTS}''')")
    report = build_engine("out", backend="rtx")
    assert (report.engine, report.sm, report.nbytes) == (Path("/e"), 86, 9)
    assert report.log_memory == {"weights_bytes": 7, "profiles": []}
    assert report.kernels == "no kernels"


def test_options_reach_the_script(process: Any) -> None:
    process("print(f'{{\"error\": \"{sys.argv[1:]}\", \"exit_code\": 4}}'.replace('{{', '{').replace('}}', '}'))")
    with pytest.raises(UnsupportedError) as caught:
        build_engine(
            "out", backend="rtx", sm=120, profiles="two", workspace="2G", timing_cache=Path("t"),
            version_compatible=True, hardware_compatible=True, layer_outputs=True,
        )  # fmt: skip
    for word in (
        "'out'", "--backend=rtx", "--sm=120", "--profiles=two", "--workspace=2G", "--timing-cache=t",
        "--version-compatible", "--hardware-compatible", "--layer-outputs",
    ):  # fmt: skip
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", ResourceError, "was killed, most likely for lack of memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", UnsupportedError, "crashed while building \\(signal 11"),
        ("sys.exit('error: no such option.')", MixtError, "exit code 1: no such option."),
        ("sys.stderr.write('usage\\nerror: bad'); sys.exit(2)", UsageError, "exit code 2: bad"),
        ("pass", MixtError, "exit code 0: it said nothing"),
        ("sys.exit(130)", KeyboardInterrupt, None),
    ],
)
def test_how_a_process_can_end(process: Any, code: str, kind: type[BaseException], said: str | None) -> None:
    process(code)
    with pytest.raises(kind, match=said):
        build_engine("out", backend="rtx")


def test_an_interrupted_caller_ends_the_process(process: Any, tmp_path: Path) -> None:
    process(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); print('{{}}', flush=True)\nsignal.pause()")

    class Interrupting:
        def task(self, label: str, total: int | None = None) -> Any:
            def advance(_units: int) -> None:
                raise KeyboardInterrupt

            return contextlib.nullcontext(advance)

        def note(self, message: str) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        build_engine("out", backend="rtx", progress=Interrupting())
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_the_process_ends_as_by_ctrl_c(process: Any, tmp_path: Path) -> None:
    """It may be writing an engine: it must get to the end of its own cleaning up."""
    process(
        "print('{}', flush=True)\ntry:\n    signal.pause()\nfinally:\n"
        f"    open({str(tmp_path / 'cleaned')!r}, 'w').close()"
    )

    class Interrupting:
        def task(self, label: str, total: int | None = None) -> Any:
            def advance(_units: int) -> None:
                time.sleep(0.2)  # until the process is in its try block
                raise KeyboardInterrupt

            return contextlib.nullcontext(advance)

        def note(self, message: str) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        build_engine("out", backend="rtx", progress=Interrupting())
    assert (tmp_path / "cleaned").exists()


def test_bad_choices_need_no_process() -> None:
    with pytest.raises(UsageError, match="--backend abacus: not a backend; choose from rtx, trt"):
        build_engine("out", backend="abacus")
    with pytest.raises(UsageError, match="--profiles three: choose one or two"):
        build_engine("out", backend="rtx", profiles="three")


def test_which_backend_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = {"tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)
    assert installed_backend() == "trt"
    there.remove("tensorrt")
    assert installed_backend() == "rtx"
    there.clear()
    with pytest.raises(
        MissingDependencyError, match=r"pip install 'mixt-export\[rtx\]'.*tensorrt-rtx-cu13==1\.7\.1\.116"
    ):
        installed_backend()


def run_cli(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mixt build", *map(str, words)])
    return guarded(load_verb("build"), "mixt build")


def test_cli_says_what_was_shown_and_what_not(
    process: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = FACTS.replace('"profiles": []', '"profiles": [{"activation_bytes": 2500000}]').replace(
        '"c"', '"parsed and compiled by TensorRT-RTX (SM86 proxy)"'
    )
    process(f"print('''{facts}''')")
    assert run_cli(monkeypatch, "out", "--backend", "rtx") == 0
    said = capsys.readouterr().out
    assert said.startswith("parsed and compiled by TensorRT-RTX (SM86 proxy), version 1")
    assert "not the memory of a Jetson" in said and "profile 0: activation 2.5 MB" in said and "wrote /e" in said
    assert "no kernels" in said


@pytest.mark.parametrize(
    ("target", "words", "code", "said"),
    [
        ("trt", ["--backend", "trt"], 6, "TensorRT (Python module 'tensorrt') is not installed"),
        ("trt", ["--backend", "rtx", "--sm", "87"], 4, "SM87 cannot be built here"),
        ("trt", ["--backend", "rtx", "--hardware-compatible"], 4, "--hardware-compatible: TensorRT-RTX does not"),
        ("onnx", ["--backend", "rtx"], 2, "was exported for target 'onnx'; export the model with --target trt"),
        (None, ["--backend", "rtx"], 2, "no such file; give the folder that `mixt export --target trt` wrote"),
    ],
)
def test_cli_errors_of_the_real_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str | None,
    words: list[str], code: int, said: str,
) -> None:  # fmt: skip
    if target is not None:
        export(write_tiny(tmp_path / "m", num_hidden_layers=1), tmp_path / "out", target=target, verify=False)
    assert run_cli(monkeypatch, tmp_path / "out", *words) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
