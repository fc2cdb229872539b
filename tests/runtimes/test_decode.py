"""Prefill, chunks, steps and batches against a float64 decoder that has no cache at all."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.runtimes.build_tiny import Shape, write_folder
from tests.runtimes.conftest import Tiny
from tests.runtimes.numpy_decoder import all_logits, greedy


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + 1000 * length).integers(0, 256, length).tolist()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Relative L2 of logits at fp32."""
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_steps_equal_whole_prefill(tiny: Tiny) -> None:
    ids = prompt(23)
    expected = all_logits(tiny.shape, tiny.weights, ids)
    cache = tiny.model.new_cache()
    assert_close(tiny.model.prefill([ids[:9]], cache)[0], expected[8])
    for position in range(9, 23):
        assert_close(tiny.model.step([ids[position]], cache)[0], expected[position])
    assert cache.tokens == [ids]
    assert cache.lengths == [23]
    whole = tiny.model.prefill([ids], tiny.model.new_cache())
    assert_close(whole[0], expected[-1])


@pytest.mark.parametrize("chunk", [1, 4, 7, 22, 23, 100])
def test_chunked_prefill(tiny: Tiny, chunk: int) -> None:
    ids = prompt(23, seed=chunk)
    expected = all_logits(tiny.shape, tiny.weights, ids)
    assert_close(tiny.model.prefill([ids], tiny.model.new_cache(), chunk=chunk)[0], expected[-1])


@pytest.mark.parametrize("lengths", [(3, 9), (9, 1, 5), (4, 4)])
def test_ragged_batch(tiny: Tiny, lengths: tuple[int, ...]) -> None:
    rows = [prompt(length + 6, seed=3) for length in lengths]
    expected = [all_logits(tiny.shape, tiny.weights, row) for row in rows]
    cache = tiny.model.new_cache(len(rows))
    starts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    logits = tiny.model.prefill(starts, cache)
    for step in range(6):
        for row, length in enumerate(lengths):
            assert_close(logits[row], expected[row][length + step - 1])
        logits = tiny.model.step([row[length + step] for row, length in zip(rows, lengths, strict=True)], cache)
    assert cache.lengths == [length + 6 for length in lengths]


def test_portable_chunks_and_continues_a_ragged_batch(rt: ModuleType, tmp_path: Path) -> None:
    shape = Shape(layers=3)
    weights = write_folder(tmp_path, "portable", shape, seed=5)
    model = rt.Model(tmp_path, threads=1)
    rows = [prompt(12, seed=1), prompt(20, seed=2)]
    cache = model.new_cache(2)
    model.prefill([rows[0][:3], rows[1][:9]], cache, chunk=4)
    logits = model.prefill([rows[0][3:], rows[1][9:]], cache, chunk=5)
    for row in range(2):
        assert_close(logits[row], all_logits(shape, weights, rows[row])[-1])


def test_ort_refuses_to_continue_a_batch(rt: ModuleType, tiny_ort: Tiny) -> None:
    cache = tiny_ort.model.new_cache(2)
    with pytest.raises(rt.PromptError, match="only for one sequence"):
        tiny_ort.model.prefill([prompt(6), prompt(8)], cache, chunk=4)
    tiny_ort.model.prefill([prompt(6), prompt(8)], cache)
    with pytest.raises(rt.PromptError, match="--target onnx"):
        tiny_ort.model.prefill([prompt(2), prompt(2)], cache)
    assert cache.lengths == [6, 8]


@pytest.mark.parametrize("batch", [1, 2])
def test_growth_of_the_buffer(rt: ModuleType, tiny: Tiny, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rt, "_FIRST_CAPACITY", 8)
    rows = [prompt(40, seed=row) for row in range(batch)]
    expected = [all_logits(tiny.shape, tiny.weights, row) for row in rows]
    cache = tiny.model.new_cache(batch)
    tiny.model.prefill([row[:5] for row in rows], cache)
    capacities = {cache.capacity}
    for position in range(5, 40):
        logits = tiny.model.step([row[position] for row in rows], cache)
        capacities.add(cache.capacity)
        for row in range(batch):
            assert_close(logits[row], expected[row][position])
    assert sorted(capacities) == [8, 16, 32, 64]
    copies = 1 if tiny.model.manifest.shared_buffer else 2
    assert cache.nbytes == copies * batch * 64 * tiny.model.manifest.kv_bytes_per_token


def test_capacity_never_exceeds_the_limit(tiny: Tiny) -> None:
    cache = tiny.model.new_cache()
    tiny.model.prefill([prompt(639)], cache)
    tiny.model.step([1], cache)
    assert cache.capacity == tiny.shape.max_seq_len == 640


def test_long_prompt_in_chunks_matches(tiny: Tiny) -> None:
    ids = prompt(300)
    expected = all_logits(tiny.shape, tiny.weights, ids)[-1]
    assert_close(tiny.model.prefill([ids], tiny.model.new_cache(), chunk=128)[0], expected)


def test_truncate_then_another_continuation(tiny: Tiny) -> None:
    ids, other = prompt(20, seed=1), prompt(6, seed=2)
    cache = tiny.model.new_cache()
    tiny.model.prefill([ids], cache)
    cache.truncate(11)
    logits = tiny.model.prefill([other], cache)
    assert_close(logits[0], all_logits(tiny.shape, tiny.weights, ids[:11] + other)[-1])
    cache.truncate(0)
    logits = tiny.model.prefill([other], cache)
    assert_close(logits[0], all_logits(tiny.shape, tiny.weights, other)[-1])


def test_steps_of_a_cache_that_was_cut_prefilled_and_grew(
    rt: ModuleType, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step keeps from the one before is right again after everything that may come between."""
    monkeypatch.setattr(rt, "_FIRST_CAPACITY", 8)
    ids = prompt(40, seed=6)
    cache, held = tiny.model.new_cache(), []

    def follows(logits: np.ndarray, *tokens: int) -> None:
        held.extend(tokens)
        assert_close(logits[0], all_logits(tiny.shape, tiny.weights, held)[-1])

    follows(tiny.model.step([ids[0]], cache), ids[0])  # an empty cache, and the buffer grows at the ninth token
    for token in ids[1:12]:
        follows(tiny.model.step([token], cache), token)
    for length, token in ((3, ids[20]), (4, ids[21]), (0, ids[22])):
        cache.truncate(length)
        del held[length:]
        follows(tiny.model.step([token], cache), token)
        follows(tiny.model.step([token + 1], cache), token + 1)
    for size in (1, 7, 1):
        follows(tiny.model.prefill([ids[:size]], cache), *ids[:size])
        follows(tiny.model.step([ids[30]], cache), ids[30])
    assert cache.tokens == [held]


def test_a_step_gives_the_bits_of_a_prompt_of_one_token(tiny: Tiny) -> None:
    """The two differ in the length of the mask where the buffer is shared."""
    stepped, prefilled = tiny.model.new_cache(), tiny.model.new_cache()
    for token in prompt(12, seed=9):
        found = tiny.model.step([token], stepped)
        np.testing.assert_array_equal(found, tiny.model.prefill([[token]], prefilled))
    assert stepped.tokens == prefilled.tokens


def test_a_failed_step_leaves_the_cache_usable(rt: ModuleType, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [prompt(9, seed=7), prompt(5, seed=8)]
    cache = tiny.model.new_cache(2)
    tiny.model.prefill([row[:-2] for row in rows], cache)
    tiny.model.step([row[-2] for row in rows], cache)

    class Interrupted:
        def run_with_iobinding(self, _binding: object) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny.model, "session", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            tiny.model.step([1, 2], cache)
    assert cache.lengths == [8, 4]
    with pytest.raises(rt.PromptError, match="1 token list"):
        tiny.model.step([3], cache)
    logits = tiny.model.step([row[-1] for row in rows], cache)
    for found, row in zip(logits, rows, strict=True):
        assert_close(found, all_logits(tiny.shape, tiny.weights, row)[-1])


def test_logits_belong_to_the_caller(tiny: Tiny) -> None:
    cache = tiny.model.new_cache()
    first = tiny.model.prefill([prompt(4)], cache)
    kept = first.copy()
    tiny.model.step([7], cache)
    np.testing.assert_array_equal(first, kept)


def test_failed_run_leaves_the_cache_usable(rt: ModuleType, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(12)
    cache = tiny.model.new_cache()
    tiny.model.prefill([ids[:8]], cache)

    class Broken:
        def run_with_iobinding(self, _binding: object) -> None:
            raise ValueError("out of luck\nsecond line")

    with monkeypatch.context() as patch:
        patch.setattr(tiny.model, "session", Broken())
        with pytest.raises(rt.OutputError, match=r"out of luck\.$"):
            tiny.model.prefill([[1, 2, 3]], cache)
    assert cache.lengths == [8]
    logits = tiny.model.prefill([ids[8:]], cache)
    assert_close(logits[0], all_logits(tiny.shape, tiny.weights, ids)[-1])


def test_greedy_generation(tiny: Tiny) -> None:
    for length in (1, 7, 30):
        ids = prompt(length, seed=4)
        generation = tiny.model.generate(ids, 16)
        assert list(generation) == greedy(tiny.shape, tiny.weights, ids, 16, stop=257)


def test_low_memory_and_threads_change_nothing(rt: ModuleType, tiny: Tiny) -> None:
    ids = prompt(9)
    expected = all_logits(tiny.shape, tiny.weights, ids)[-1]
    for options in ({"low_memory": True}, {"threads": 2, "spinning": True}):
        model = rt.Model(tiny.folder, **options)
        assert_close(model.prefill([ids], model.new_cache())[0], expected)


def test_wrong_position_would_be_seen(tiny: Tiny) -> None:
    """Fault injection: a prompt shifted by one position must not pass the tolerance of the other tests."""
    ids = prompt(9)
    expected = all_logits(tiny.shape, tiny.weights, [0, *ids])[-1]
    found = tiny.model.prefill([ids], tiny.model.new_cache())[0]
    assert np.linalg.norm(found - expected) > 1e-2 * np.linalg.norm(expected)
