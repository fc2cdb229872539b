from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixt_export.errors import UsageError
from mixt_export.verification import VerifyOptions
from mixt_export.verification.tokens import make_sequences, open_tokenizer, read_text


def test_windows_hold_the_positions_asked_for_and_differ(model: Path) -> None:
    found = make_sequences(open_tokenizer(model), 300, 256, VerifyOptions(positions=300))
    assert sum(map(len, found.windows)) == 300
    assert len({window.tobytes() for window in found.windows}) == len(found.windows)
    assert len(found.prompts) == 8
    thorough = make_sequences(open_tokenizer(model), 300, 512, VerifyOptions(thorough=True))
    assert sum(map(len, thorough.windows)) >= 2000


def test_without_a_tokenizer_tokens_are_random_and_seeded(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path) is None
    first, again, other = (make_sequences(None, 50, 64, VerifyOptions(seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.windows[0], again.windows[0])
    assert not np.array_equal(first.windows[0], other.windows[0])
    assert max(window.max() for window in first.windows) < 50
    assert max(map(len, first.windows)) <= 64


def test_prompts_from_a_file(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one prompt\n\n  \nzwei: ä\n", encoding="utf-8")
    found = make_sequences(open_tokenizer(model), 300, 256, VerifyOptions(prompts=path))
    assert [len(prompt) for prompt in found.prompts] == [10, 8]
    with pytest.raises(UsageError, match=r"need a tokenizer\.json"):
        make_sequences(None, 300, 256, VerifyOptions(prompts=path))


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", "not UTF-8"), (b"  \n", "holds no text"), (None, "cannot be read")]
)
def test_bad_text_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_text(path)


def test_a_damaged_tokenizer_and_one_of_another_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="not a readable tokenizer"):
        open_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="the model has 40"):
        make_sequences(open_tokenizer(model), 40, 256, VerifyOptions())


@pytest.mark.parametrize(
    "options", [{"positions": 1}, {"batch": 1}, {"greedy_tokens": 0}, {"tolerance": 0.0}, {"tolerance": 2.0}]
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="--"):
        VerifyOptions(**options)
