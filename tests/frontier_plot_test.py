"""How far a share of good answers is at least, beside the laws that have it."""

import numpy as np
import pytest

from llama_jax.rl.rejection import best_of_n_divergence
from tests.frontier_plot import least_divergence, plot_ways


@pytest.mark.parametrize('beta', [0.1, 1.0])
def test_the_best_policy_for_a_price_is_as_far_as_its_share_says(beta):
    """Of 16 answers, 3 of them good."""
    base = np.random.default_rng(0).dirichlet(np.ones(16))
    good = np.arange(16) < 3
    policy = base * np.exp(good / beta)
    policy /= policy.sum()
    away = float(np.sum(policy * np.log(policy / base)))
    assert least_divergence(policy[good].sum(), base[good].sum()) == pytest.approx(away, rel=1e-9)


def test_all_good_answers_are_as_far_as_they_are_rare_and_the_best_of_n_is_no_nearer():
    assert least_divergence(1.0, 0.05) == pytest.approx(np.log(20))
    assert least_divergence(0.05, 0.05) == 0.0
    for n in (2, 8, 64):
        assert least_divergence(1 - 0.95**n, 0.05) <= best_of_n_divergence(n)


def test_ways_are_drawn(tmp_path):
    file = tmp_path / 'shares.png'
    plot_ways(file, {'one': [(0.0, 0.05), (3.0, 0.5)], 'other': [(1.0, 0.2)]}, 'share', 0.05)
    assert file.read_bytes().startswith(b'\x89PNG')
