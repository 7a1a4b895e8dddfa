"""pass@k and the majority vote against closed forms."""

import itertools
import math
import random

import pytest

from llama_jax.grading.sampling_metrics import majority, pass_at_k


@pytest.mark.parametrize(('n', 'c', 'k'), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 6), (7, 1, 7), (8, 3, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Over samples that are right with p, its mean is 1 - (1 - p)^k: summed over the binomial law of c, exactly."""
    n, p = 12, 0.3
    for k in (1, 5, 12):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_does_not_overflow():
    assert 0 < pass_at_k(200, 1, 100) == pytest.approx(0.5)


@pytest.mark.parametrize(('n', 'c', 'k'), [(5, 6, 1), (5, 1, 6), (5, 1, 0), (5, -1, 1)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match='pass@'):
        pass_at_k(n, c, k)


def test_majority_follows_the_binomial_law():
    """Two answers, the right one with p = 0.6, 7 votes: it wins where it has at least 4."""
    rng, votes, p, trials = random.Random(0), 7, 0.6, 4000
    wins = sum(
        majority(['right' if rng.random() < p else 'wrong' for _ in range(votes)], '?') == 'right'
        for _ in range(trials)
    )
    expected = sum(math.comb(votes, c) * p**c * (1 - p) ** (votes - c) for c in range(4, 8))
    assert abs(wins / trials - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)


def test_ties_and_invalid_answers():
    assert majority(['a', 'b', 'b', 'a'], '?') == 'a'
    assert majority(['?', '?', 'b'], '?') == 'b'
    assert majority(['?', '?'], '?') == '?'
