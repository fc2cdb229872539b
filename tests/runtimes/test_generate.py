"""Stopping, limits, prefix reuse and timings of generation; bad requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.runtimes.build_tiny import Shape, write_folder
from tests.runtimes.conftest import Tiny
from tests.runtimes.numpy_decoder import greedy
from tests.runtimes.test_decode import prompt


class Scripted:
    """A sampler that says given tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def __call__(self, _logits: np.ndarray, _history: Sequence[int]) -> int:
        return self.tokens.pop(0)


def test_stops_at_the_folders_end_token(tiny: Tiny) -> None:
    generation = tiny.model.generate([1, 2], 10, Scripted([5, 6, 257, 7]))
    assert list(generation) == [5, 6]
    assert generation.finish_reason == "stop"
    assert generation.stats.new_tokens == 2


def test_own_stop_tokens_replace_the_folders(tiny: Tiny) -> None:
    generation = tiny.model.generate([1, 2], 10, Scripted([5, 257, 9, 7]), stop={9})
    assert list(generation) == [5, 257]
    generation = tiny.model.generate([1, 2], 4, Scripted([5, 257, 9, 7]), stop=())
    assert list(generation) == [5, 257, 9, 7]
    assert generation.finish_reason == "length"


def test_stop_as_first_token(tiny: Tiny) -> None:
    generation = tiny.model.generate([1, 2], 10, Scripted([257]))
    assert list(generation) == []
    assert generation.finish_reason == "stop"


def test_max_new_tokens_does_no_extra_step(tiny: Tiny) -> None:
    cache = tiny.model.new_cache()
    generation = tiny.model.generate(prompt(4), 3, stop=(), cache=cache)
    assert len(list(generation)) == 3
    assert cache.lengths == [6]
    assert generation.stats.decode_steps == 2


def test_max_seq_len_ends_generation(rt: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> None:
    for dialect in ("ort", "portable"):
        folder = tmp_path_factory.mktemp(dialect)
        shape = Shape(max_seq_len=16)
        weights = write_folder(folder, dialect, shape)
        model = rt.Model(folder, threads=1)
        ids = prompt(11)
        generation = model.generate(ids, 100, stop=())
        expected = greedy(shape, weights, ids, 5, stop=-1)
        assert list(generation)[:5] == expected
        assert generation.finish_reason == "max_seq_len"
        # 5 more fill the 16 positions; the logits of the last position give one token beyond them
        assert generation.stats.new_tokens == 6
        full = model.generate(prompt(16), 100, stop=())
        assert len(list(full)) == 1
        with pytest.raises(rt.PromptError, match=r"17 tokens do not fit.*at most 16"):
            model.generate(prompt(17), 1)
        cache = model.new_cache()
        model.prefill([prompt(16)], cache)
        with pytest.raises(rt.PromptError, match="17 tokens do not fit"):
            model.step([1], cache)


def test_prefix_reuse_gives_the_same_tokens(tiny: Tiny) -> None:
    cache = tiny.model.new_cache()
    first = prompt(12, seed=1)
    answer = list(tiny.model.generate(first, 5, cache=cache, stop=()))
    second = [*first, *answer, *prompt(4, seed=9)]
    again = tiny.model.generate(second, 6, cache=cache, stop=())
    assert list(again) == greedy(tiny.shape, tiny.weights, second, 6, stop=-1)
    assert again.stats.reused_tokens == 16  # the last token of the answer was never run
    assert again.stats.prompt_tokens == 5
    branch = [*first[:7], *prompt(3, seed=2)]
    other = tiny.model.generate(branch, 6, cache=cache, stop=())
    assert list(other) == greedy(tiny.shape, tiny.weights, branch, 6, stop=-1)
    assert other.stats.reused_tokens == 7


@pytest.mark.parametrize(("weights", "pieces"), [("float", [4, 4, 3]), ("integer", [3, 3, 3, 2])])
def test_prompts_go_in_pieces_that_suit_the_weights(
    tiny: Tiny, rt: ModuleType, monkeypatch: pytest.MonkeyPatch, weights: str, pieces: list[int]
) -> None:
    monkeypatch.setattr(rt, "_PREFILL_CHUNK", {"float": 4, "integer": 3})
    monkeypatch.setattr(tiny.model, "manifest", replace(tiny.model.manifest, weights=weights))
    expected = greedy(tiny.shape, tiny.weights, prompt(11), 1, stop=-1)
    for chunk, sizes in ((0, pieces), (None, [11]), (6, [6, 5])):
        assert runs(tiny, monkeypatch, chunk) == (expected, sizes)


def runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> tuple[list[int], list[int]]:
    """The next token behind a prompt of 11, and how many tokens each run appended."""
    cache, run, filled = tiny.model.new_cache(), tiny.model._run, [0]

    def counted(binding: object) -> None:
        filled.append(int(cache._mask.sum()))
        run(binding)

    with monkeypatch.context() as patched:
        patched.setattr(tiny.model, "_run", counted)
        tokens = list(tiny.model.generate(prompt(11), 1, cache=cache, chunk=chunk, stop=()))
    return tokens, np.diff(filled).tolist()


def test_the_manifest_says_whether_weights_are_integers(rt: ModuleType, tmp_path: Path) -> None:
    write_folder(tmp_path, "ort", Shape())
    assert rt.read_manifest(tmp_path).weights == "float"
    path = tmp_path / "mixt_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantisation": {"bits": 8}}))
    assert rt.read_manifest(tmp_path).weights == "integer"


def test_same_prompt_twice_runs_only_its_last_token(tiny: Tiny) -> None:
    cache = tiny.model.new_cache()
    ids = prompt(12, seed=1)
    once = list(tiny.model.generate(ids, 5, cache=cache))
    again = tiny.model.generate(ids, 5, cache=cache)
    assert list(again) == once
    assert again.stats.prompt_tokens == 1


def test_abandoned_generation_leaves_the_cache_usable(tiny: Tiny) -> None:
    cache = tiny.model.new_cache()
    ids = prompt(8, seed=5)
    started = tiny.model.generate(ids, 50, cache=cache, stop=())
    next(started)
    next(started)
    assert list(tiny.model.generate(ids, 4, cache=cache, stop=())) == greedy(tiny.shape, tiny.weights, ids, 4, stop=-1)


def test_sampled_generation_repeats_with_its_seed(rt: ModuleType, tiny: Tiny) -> None:
    def run(seed: int) -> list[int]:
        return list(tiny.model.generate(prompt(5), 12, rt.Sampler(1.0, top_p=0.9, seed=seed), stop=()))

    assert run(1) == run(1) != run(2)


def test_stats(rt: ModuleType, tiny: Tiny) -> None:
    generation = tiny.model.generate(prompt(9), 5, stop=())
    list(generation)
    stats = generation.stats
    data = stats.as_dict()
    assert (data["prompt_tokens"], data["new_tokens"], stats.decode_steps) == (9, 5, 4)
    assert 0 < data["prefill_s"] <= data["first_token_s"]
    assert data["decode_tok_s"] == pytest.approx(4 / data["decode_s"])
    assert data["prefill_tok_s"] == pytest.approx(9 / data["prefill_s"])
    assert data["peak_rss_bytes"] > 20e6
    assert "prefill 9 tokens" in stats.line()
    assert rt.Stats().prefill_tok_s == rt.Stats().decode_tok_s == 0.0


def test_bad_requests(rt: ModuleType, tiny: Tiny) -> None:
    model = tiny.model
    cases = (
        (lambda: model.generate([], 1), "no tokens"),
        (lambda: model.generate([1, 261], 1), "261, which is not a token id from 0 to 260"),
        (lambda: model.generate([-1], 1), "-1, which is not"),
        (lambda: model.generate([1], 0), "max_new_tokens is 0"),
        (lambda: model.generate([1], 1, cache=model.new_cache(2)), "one sequence, not of 2"),
        (lambda: model.prefill([[1], [2]], model.new_cache()), "2 token list"),
        (lambda: model.prefill([[1], []], model.new_cache(2)), "sequence 1 has no tokens"),
        (lambda: model.prefill([[1.5]], model.new_cache()), "1.5, which is not"),
        (lambda: model.prefill([[True]], model.new_cache()), "True, which is not"),
        (lambda: model.prefill([[1, 2]], model.new_cache(), chunk=0), "chunk is 0"),
        (lambda: model.new_cache(0), "batch of 0"),
        (lambda: model.new_cache(2).truncate(0), "only a single sequence"),
        (lambda: model.new_cache().truncate(1), "only to a shorter"),
        (lambda: rt.Model(tiny.folder, threads=0), "threads is 0"),
    )
    for call, text in cases:
        with pytest.raises(rt.PromptError, match=text):
            call()
