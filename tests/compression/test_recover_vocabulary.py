"""The divergence on a part of the vocabulary against the whole one in numpy."""

from __future__ import annotations

import numpy as np
import torch

from mixt_export.compression.recover.vocabulary import Vocabulary, divergence


def exact(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (teacher, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    found: np.ndarray = (p * np.log(p / q)).sum(-1)
    return found


def logits(seed: int, size: int = 500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    teacher = 2 * rng.standard_normal((5, size))
    return teacher, teacher + 0.7 * rng.standard_normal((5, size))


def test_the_whole_vocabulary_gives_the_exact_divergence() -> None:
    teacher, student = logits(0)
    whole = divergence(torch.from_numpy(teacher), torch.from_numpy(student)).numpy()
    np.testing.assert_allclose(whole, exact(teacher, student), rtol=1e-10)
    rows, weights = Vocabulary(torch.arange(470), 500, 40).draw(torch.tensor([3]), torch.Generator())
    assert sorted(rows.tolist()) == list(range(500))
    assert not weights.any()


def test_a_part_estimates_it() -> None:
    """Averaged over draws within a few percent, where the uncorrected distribution of the part is far off."""
    teacher, student = logits(1)
    order = np.argsort(-np.exp(teacher).mean(0))
    vocabulary = Vocabulary(torch.from_numpy(order[:60].copy()), 500, 80)
    generator = torch.Generator().manual_seed(0)
    found, plain = [], []
    for _ in range(300):
        rows, weights = vocabulary.draw(torch.empty(0, dtype=torch.int64), generator)
        t, s = (torch.from_numpy(x[:, rows.numpy()]) for x in (teacher, student))
        found.append(divergence(t, s, weights).numpy())
        plain.append(divergence(t, s).numpy())
    error = np.abs(np.mean(found, 0) / exact(teacher, student) - 1)
    assert error.max() < 0.1
    assert error.mean() < 0.6 * np.abs(np.mean(plain, 0) / exact(teacher, student) - 1).mean()


def test_what_is_asked_for_is_there_once_and_the_rest_weighs_what_is_missing() -> None:
    vocabulary = Vocabulary(torch.tensor([1, 5]), 1000, 50)
    rows, weights = vocabulary.draw(torch.tensor([[7, 5], [7, 900]]), torch.Generator().manual_seed(0))
    assert rows[:4].tolist() == [1, 5, 7, 900]
    assert not weights[:4].any()
    np.testing.assert_allclose(weights[4:].numpy(), np.log(996 / 50), rtol=1e-6)
    assert not set(rows[4:].tolist()) & {1, 5, 7, 900}
