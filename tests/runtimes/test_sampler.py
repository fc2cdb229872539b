"""The sampler's statistics against the definitions, written again here."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    mass = np.exp(logits.astype(np.float64) / temperature)
    return mass / mass.sum()


def draw(rt: ModuleType, logits: np.ndarray, count: int = 8_000, **options: float) -> np.ndarray:
    """Observed frequencies of ``count`` draws."""
    sampler = rt.Sampler(seed=11, **options)
    tokens = [sampler(logits) for _ in range(count)]
    return np.bincount(tokens, minlength=logits.size) / count


def assert_frequencies(found: np.ndarray, expected: np.ndarray, count: int = 8_000) -> None:
    """Every frequency within five standard deviations of a binomial; impossible tokens never drawn."""
    assert (found[expected == 0] == 0).all()
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12).all()


@pytest.fixture
def logits() -> np.ndarray:
    return (2 * np.random.default_rng(0).standard_normal(37)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature(rt: ModuleType, logits: np.ndarray, temperature: float) -> None:
    assert_frequencies(draw(rt, logits, temperature=temperature), softmax(logits, temperature))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_top_p_mass(rt: ModuleType, logits: np.ndarray, top_p: float) -> None:
    mass = softmax(logits, 1.3)
    kept, total = np.zeros_like(mass), 0.0
    for token in sorted(range(mass.size), key=lambda index: -mass[index]):
        if total >= top_p:
            break
        kept[token] = mass[token]
        total += mass[token]
    assert_frequencies(draw(rt, logits, temperature=1.3, top_p=top_p), kept / kept.sum())


def test_top_p_beyond_the_sorted_head(rt: ModuleType) -> None:
    """A flat distribution over many tokens needs more than the first sorted head."""
    flat = np.zeros(1000, np.float32)
    flat[:600] = 2.0
    nucleus = rt._nucleus(softmax(flat, 1.0), 0.95)
    mass = softmax(flat, 1.0)
    assert mass[nucleus].sum() >= 0.95 > mass[nucleus[:-1]].sum()
    assert set(nucleus[:600].tolist()) == set(range(600))


def test_top_p_one_ulp_below_one_keeps_everything_needed(rt: ModuleType) -> None:
    mass = softmax(np.zeros(777), 1.0)
    assert rt._nucleus(mass, np.nextafter(1.0, 0.0)).size >= 776


def test_top_k(rt: ModuleType, logits: np.ndarray) -> None:
    mass = softmax(logits, 1.0)
    mass[np.argsort(-mass)[5:]] = 0
    assert_frequencies(draw(rt, logits, temperature=1.0, top_k=5), mass / mass.sum())
    assert set(np.flatnonzero(draw(rt, logits, 200, temperature=3.0, top_k=1))) == {int(logits.argmax())}


def test_top_k_and_top_p_compose(rt: ModuleType, logits: np.ndarray) -> None:
    mass = softmax(logits, 1.0)
    order = np.argsort(-mass)
    mass[order[6:]] = 0
    mass /= mass.sum()
    keep = int((np.cumsum(mass[order]) < 0.7).sum()) + 1
    mass[order[keep:]] = 0
    assert_frequencies(draw(rt, logits, temperature=1.0, top_k=6, top_p=0.7), mass / mass.sum())


def test_temperature_towards_zero_is_greedy(rt: ModuleType, logits: np.ndarray) -> None:
    best = int(logits.argmax())
    for temperature in (0.0, 1e-3, 1e-30, 5e-324):
        sampler = rt.Sampler(temperature=temperature, seed=1)
        assert {sampler(logits) for _ in range(50)} == {best}


def test_seed(rt: ModuleType, logits: np.ndarray) -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = rt.Sampler(temperature=1.0, top_p=0.95, seed=seed)
        return [sampler(logits) for _ in range(40)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


def test_repetition_penalty(rt: ModuleType) -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.5], np.float32)
    before = logits.copy()
    assert rt.Sampler(repetition_penalty=1.5)(logits, [0, 0, 3]) == 1
    assert rt.Sampler(repetition_penalty=1.2)(logits, [0]) == 0
    np.testing.assert_array_equal(logits, before)
    expected = softmax(np.array([2.0 / 1.5, 1.5, -1.0, -1.5 * 1.5]), 1.0)
    sampler = rt.Sampler(temperature=1.0, repetition_penalty=1.5, seed=0)
    found = np.bincount([sampler(logits, [3, 0]) for _ in range(8_000)], minlength=4) / 8_000
    assert_frequencies(found, expected)


def test_masked_logits_are_never_drawn(rt: ModuleType) -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.3], np.float32)
    assert draw(rt, logits, 500, temperature=2.0, top_p=0.99)[[0, 2]].sum() == 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_unusable_logits(rt: ModuleType, logits: np.ndarray, poison: float) -> None:
    logits[4] = poison
    with pytest.raises(rt.OutputError, match="NaN or infinite"):
        rt.Sampler()(logits)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_options_out_of_range(rt: ModuleType, options: dict[str, float]) -> None:
    with pytest.raises(rt.PromptError, match=next(iter(options))):
        rt.Sampler(**options)
