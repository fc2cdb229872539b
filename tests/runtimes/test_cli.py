"""`mixt run` and `mixt chat` on tiny folders."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from mixt_export import runtime
from mixt_export.cli import chat as chat_module
from mixt_export.cli import main
from mixt_export.cli.chat import app as chat
from mixt_export.cli.run import app as run
from mixt_export.errors import UsageError
from tests.runtimes.build_tiny import write_folder
from tests.runtimes.conftest import Tiny

PROGRAM = "import sys; from mixt_export.cli.main import mixt; sys.argv[0] = 'mixt'; mixt()"


def mixt(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """The real program in its own process."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, encoding="utf-8", env=environment, input=text
    )


@pytest.fixture
def raw_folder(tmp_path: Path) -> Path:
    """A folder without a chat template."""
    write_folder(tmp_path / "raw", "ort", seed=3)
    (tmp_path / "raw" / "tokenizer_config.json").unlink()
    return tmp_path / "raw"


def test_run_streams_text_and_says_its_speed(rt: ModuleType, tiny: Tiny) -> None:
    result = CliRunner().invoke(run, [str(tiny.folder), "-p", "hello", "--raw", "--max-tokens", "9", "--threads", "1"])
    assert result.exit_code == 0, result.output
    tokenizer = rt.Tokenizer(tiny.folder)
    stream = tokenizer.stream()
    expected = [stream.push(token) for token in tiny.model.generate(tokenizer.encode("hello"), 9)]
    assert result.stdout == "".join(expected) + stream.finish() + "\n"
    for part in ("prefill 5 tokens", "decode 9 tokens", "tok/s", "peak RSS"):
        assert part in result.stderr


def test_run_json(rt: ModuleType, tiny: Tiny) -> None:
    options = ["--max-tokens", "6", "--json", "--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--seed", "5"]
    results = [CliRunner().invoke(run, [str(tiny.folder), "-p", "hé", *options]) for _ in range(2)]
    first, second = (json.loads(result.stdout) for result in results)
    assert results[0].stderr == ""
    assert first["token_ids"] == second["token_ids"]
    assert first["prompt_token_ids"] == rt.Tokenizer(tiny.folder).encode_chat([{"role": "user", "content": "hé"}])
    assert first["finish_reason"] in {"length", "stop"}
    assert first["stats"]["new_tokens"] == len(first["token_ids"])


def test_run_without_template_is_raw(raw_folder: Path) -> None:
    result = CliRunner().invoke(run, [str(raw_folder), "-p", "ab", "--json", "--max-tokens", "2"])
    assert len(json.loads(result.stdout)["prompt_token_ids"]) == 2
    refused = CliRunner().invoke(run, [str(raw_folder), "-p", "ab", "--chat"])
    assert isinstance(refused.exception, UsageError)
    assert "has no chat template" in str(refused.exception)
    system = CliRunner().invoke(run, [str(raw_folder), "-p", "ab", "--system", "be brief"])
    assert isinstance(system.exception, UsageError)


def test_run_reads_the_prompt_from_a_pipe(tiny: Tiny) -> None:
    result = CliRunner().invoke(run, [str(tiny.folder), "--raw", "--json", "--max-tokens", "1"], input="xyz")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["prompt_token_ids"]) == 3


def test_run_with_system_text(rt: ModuleType, tiny: Tiny) -> None:
    result = CliRunner().invoke(
        run, [str(tiny.folder), "-p", "u", "--system", "s", "--json", "--max-tokens", "1", "--no-stats"]
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert json.loads(result.stdout)["prompt_token_ids"] == rt.Tokenizer(tiny.folder).encode_chat(messages)


def test_empty_raw_prompt_starts_from_bos(tmp_path: Path, tiny: Tiny) -> None:
    write_folder(tmp_path, "ort", bos_token_id=256)
    result = CliRunner().invoke(run, [str(tmp_path), "-p", "", "--raw", "--json", "--max-tokens", "1"])
    assert json.loads(result.stdout)["prompt_token_ids"] == [256]
    refused = CliRunner().invoke(run, [str(tiny.folder), "-p", "", "--raw"])
    assert isinstance(refused.exception, UsageError)
    assert "no tokens" in str(refused.exception)


def test_bad_input_is_one_line_and_exit_code_2(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = (
        ((str(tmp_path / "none"), "-p", "x"), "is not a folder"),
        ((str(tmp_path), "-p", "x"), "tokenizer.json: no such file"),
        ((str(tiny.folder), "-p", "x" * 700), "do not fit"),
        ((str(tiny.folder), "-p", "x", "--top-p", "2"), "top_p is 2.0"),
    )
    for arguments, text in cases:
        monkeypatch.setattr(sys, "argv", ["mixt", "run", *arguments])
        with pytest.raises(SystemExit) as left:
            main.mixt()
        printed = capsys.readouterr()
        assert left.value.code == 2
        assert text in printed.err
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert printed.out == ""


def test_terminal_without_unicode(tiny: Tiny) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", PROGRAM, "run", str(tiny.folder), "-p", "ab", "--temperature", "3", "--seed", "1"]
    result = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert result.stdout.isascii()
    assert b"?" in result.stdout


def test_chat_through_a_pipe(tiny: Tiny) -> None:
    lines = "first\n\nsecond\n/nonsense\n/reset\nfirst\n/exit\nnever\n"
    result = mixt("chat", str(tiny.folder), "--temperature", "0", "--max-tokens", "12", text=lines)
    assert result.returncode == 0, result.stderr
    stats = [line for line in result.stderr.splitlines() if "tok/s" in line]
    assert len(stats) == 3
    assert "cached" not in stats[0]
    assert "cached" in stats[1]  # the second turn continues the first
    assert "/nonsense: unknown command" in result.stderr
    assert "never" not in result.stdout


def test_conversation_equals_recomputation(rt: ModuleType, tiny: Tiny) -> None:
    """Reusing the cache across turns must not change an answer; /reset must forget."""
    tokenizer = rt.Tokenizer(tiny.folder)

    def talk() -> runtime.Conversation:
        return runtime.Conversation(tiny.model, tokenizer, rt.Sampler(), max_tokens=10, system="sys")

    one = talk()
    first = "".join(one.ask("how are you?"))
    second = "".join(one.ask("and now?"))
    assert one.stats.reused_tokens > 20
    assert [message["role"] for message in one.messages] == ["system", "user", "assistant", "user", "assistant"]
    fresh = tokenizer.stream()
    expected = [fresh.push(t) for t in tiny.model.generate(tokenizer.encode_chat(one.messages[:-1]), 10)]
    assert second == "".join(expected) + fresh.finish()
    one.reset()
    assert one.messages == [{"role": "system", "content": "sys"}]
    assert "".join(one.ask("how are you?")) == first


def test_conversation_that_no_longer_fits_keeps_its_history(rt: ModuleType, tiny: Tiny) -> None:
    conversation = runtime.Conversation(tiny.model, rt.Tokenizer(tiny.folder), rt.Sampler(), max_tokens=4)
    list(conversation.ask("short"))
    before = list(conversation.messages)
    with pytest.raises(rt.PromptError, match="do not fit"):
        list(conversation.ask("x" * 700))
    assert conversation.messages == before
    result = CliRunner().invoke(chat, [str(tiny.folder), "--max-tokens", "4"], input="x" * 700 + "\nok\n")
    assert result.exit_code == 0
    assert "/reset starts anew" in result.stderr
    assert "decode 4 tokens" in result.stderr or "prefill" in result.stderr


def test_interrupt_stops_the_answer_only(
    rt: ModuleType, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of an answer: the rest is not computed, what was said stays in the history."""
    conversation = runtime.Conversation(tiny.model, rt.Tokenizer(tiny.folder), rt.Sampler(), max_tokens=50)
    real = tiny.model.generate

    def interrupted(*arguments: object, **options: object) -> Iterator[int]:
        generation = real(*arguments, **options)

        class Interrupting:
            stats = generation.stats

            def __iter__(self) -> Iterator[int]:
                for count, _ in enumerate(range(50)):
                    if count == 3:
                        signal.raise_signal(signal.SIGINT)
                    yield 65 + count

        return Interrupting()  # type: ignore[return-value]

    monkeypatch.setattr(tiny.model, "generate", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    chat_module._answer(conversation, "count")
    assert signal.getsignal(signal.SIGINT) is handler
    said = rt.Tokenizer(tiny.folder).decode([65, 66, 67, 68])
    assert capsys.readouterr().out == said + "\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": said}


def test_chat_needs_a_template(raw_folder: Path) -> None:
    result = CliRunner().invoke(chat, [str(raw_folder)], input="hi\n")
    assert isinstance(result.exception, UsageError)
    assert "mixt run --raw" in str(result.exception)


def test_chat_in_a_terminal(tiny: Tiny) -> None:
    """A pseudo-terminal: prompt, answer, Ctrl-C at the prompt gives help, Ctrl-D leaves with code 0."""
    ours, theirs = pty.openpty()
    arguments = ["chat", str(tiny.folder), "--max-tokens", "5", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb", "PYTHONIOENCODING": "utf-8"},
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""

    def seen_within(text: bytes, count: int, seconds: float) -> bool:
        nonlocal seen
        end = time.monotonic() + seconds
        while seen.count(text) < count:
            if not select.select([ours], [], [], max(0.0, end - time.monotonic()))[0]:
                return False
            seen += os.read(ours, 4096)
        return True

    def wait_for(text: bytes, count: int = 1) -> None:
        assert seen_within(text, count, 60), seen

    try:
        wait_for(b"> ")
        os.write(ours, b"hello\n")
        wait_for(b"peak RSS")
        wait_for(b"> ", 2)
        # readline loses a signal that comes between drawing the prompt and waiting: press again, as one would.
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            if seen_within(b"Ctrl-C stops an answer", 2, 2):
                break
        wait_for(b"Ctrl-C stops an answer", 2)
        wait_for(b"> ", 3)
        os.write(ours, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
