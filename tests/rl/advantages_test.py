import dataclasses

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.losses.policy import PPO, PRESETS
from llama_jax.rl.advantages import (
    Horizon,
    differing,
    explained_variance,
    gae,
    group_advantages,
    make_advantages,
    next_beta,
    token_rewards,
    truncated_importance,
    value_slope,
    whiten,
)

RNG = np.random.default_rng()  # new numbers each time
LENGTHS = [1, 7, 3, 12, 5, 2, 30, 4]
GROUPS = np.array([0, 0, 0, 1, 1, 1, 2, 2])
SCORES, BETA = RNG.normal(size=8), 0.2
AWAY, VALUES = ([RNG.normal(size=n) for n in LENGTHS] for _ in range(2))


def test_a_reward_lands_on_the_last_token_as_it_is():
    for score, away, found in zip(SCORES, AWAY, token_rewards(SCORES, AWAY, BETA), strict=True):
        wanted = -BETA * away
        wanted[len(away) - 1] += score
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    whole = token_rewards(np.array([0.7]), [np.zeros(3, np.int32)], 0.0)
    assert list(whole[0]) == [0.0, 0.0, 0.7]


def test_advantages_are_sums_of_errors():
    """Schulman et al. 2016, equation 16, term by term."""
    horizon = Horizon(discount=0.97, trace=0.9)
    for values in VALUES:
        n = len(values)
        rewards = RNG.normal(size=n)
        after = [*values[1:], 0.0]
        errors = [rewards[t] + 0.97 * after[t] - values[t] for t in range(n)]
        wanted = [sum((0.97 * 0.9) ** (s - t) * errors[s] for s in range(t, n)) for t in range(n)]
        np.testing.assert_allclose(gae(rewards, values, horizon), wanted, rtol=1e-9, atol=1e-12)


def test_with_values_and_without_discount_returns_are_what_was_expected_and_more():
    made = make_advantages(
        dataclasses.replace(PPO, whiten=False), SCORES, AWAY, beta=BETA, groups=GROUPS, values=VALUES,
        horizon=Horizon(1.0, 1.0),
    )  # fmt: skip
    for rewards, expected, worth, came in zip(
        token_rewards(SCORES, AWAY, BETA), VALUES, made.advantages, made.returns, strict=True
    ):
        np.testing.assert_allclose(came, np.cumsum(rewards[::-1])[::-1], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(worth, came - expected, rtol=1e-9, atol=1e-12)


def test_whitening_is_over_all_answers():
    made = make_advantages(PPO, SCORES, AWAY, beta=BETA, groups=GROUPS, values=VALUES).advantages
    together = np.concatenate(made)
    assert together.mean() == pytest.approx(0, abs=1e-9) and together.std() == pytest.approx(1, abs=1e-6)
    halves = np.concatenate([*whiten(made[:4]), *whiten(made[4:])])
    assert np.abs(halves - together).max() > 1e-3  # as devices would do it, each by itself
    assert all(np.all(one == 0) for one in whiten([np.full(3, 0.1), np.full(2, 0.1)]))


@pytest.mark.parametrize('preset', ['rloo', 'grpo', 'dr_grpo', 'reinforce'])
@pytest.mark.parametrize('divergence', ['reward', 'none'])
def test_advantages_without_values_in_float64(preset, divergence):
    algorithm = dataclasses.replace(PRESETS[preset], divergence=divergence)
    made = make_advantages(algorithm, SCORES, AWAY, beta=BETA, groups=GROUPS)
    cost = BETA if divergence == 'reward' else 0.0
    totals = SCORES - cost * np.array([one.sum() for one in AWAY])
    if preset == 'reinforce':
        came = []
        for score, away in zip(SCORES, AWAY, strict=True):
            came.append([score - cost * away[t:].sum() for t in range(len(away))])
        mean = sum(map(sum, came)) / sum(LENGTHS)
        for found, one in zip(made.advantages, came, strict=True):
            np.testing.assert_allclose(found, np.array(one) - mean, rtol=1e-9, atol=1e-12)
        return
    for i, total in enumerate(totals):
        group = [totals[j] for j in range(8) if GROUPS[j] == GROUPS[i]]
        others = [totals[j] for j in range(8) if GROUPS[j] == GROUPS[i] and j != i]
        mean = sum(group) / len(group)
        spread = (sum((x - mean) ** 2 for x in group) / (len(group) - 1)) ** 0.5
        wanted = {
            'rloo': total - sum(others) / len(others), 'grpo': (total - mean) / (spread + 1e-4),
            'dr_grpo': total - mean,
        }[preset]  # fmt: skip
        np.testing.assert_allclose(made.advantages[i], np.full(LENGTHS[i], wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('kind', ['leave_one_out', 'group_mean', 'group_std'])
def test_equal_scores_in_a_group_teach_exactly_nothing(kind):
    scores = np.array([0.1, 0.1, 0.1, 0.3, 0.1, 0.7])
    found = group_advantages(scores, np.array([4, 4, 4, 1, 1, 1]), kind)
    assert list(found[:3]) == [0.0, 0.0, 0.0] and np.all(found[3:] != 0)
    assert differing(scores, np.array([4, 4, 4, 1, 1, 1])) == {1}


def test_an_importance_is_cut_above():
    found = truncated_importance([np.log([0.2, 0.9])], [np.log([0.4, 0.1])], 2.0)
    np.testing.assert_allclose(found[0], [0.5, 2.0])


def test_explained_variance():
    came = [np.array([1.0, 2.0]), np.array([4.0])]
    assert explained_variance(came, came) == 1.0
    assert explained_variance([np.zeros(2), np.zeros(1)], came) == 0.0
    assert explained_variance(came, [np.ones(2), np.ones(1)]) == 0.0


def test_a_slope_is_that_of_the_least_squares_line_and_explains_no_less_than_nothing():
    came = [2.0 + 0.3 * one + RNG.normal(size=len(one)) for one in VALUES]
    flat, line = np.concatenate(VALUES), np.concatenate(came)
    (slope, _), *_ = np.linalg.lstsq(np.stack([flat, np.ones(len(flat))], 1), line, rcond=None)
    assert value_slope(VALUES, came) == pytest.approx(max(slope, 0.0), rel=1e-9)
    far = [40.0 * one - 7.0 for one in VALUES]  # on a scale of its own they explain less than nothing
    assert explained_variance(far, came) < 0
    scaled = [value_slope(far, came) * one for one in far]
    alike = np.corrcoef(flat, line)[0, 1]
    assert explained_variance(scaled, came) == pytest.approx(max(alike, 0.0) ** 2, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize('values', [[-1.0, -2.0, -4.0], [0.0, 0.0, 0.0], [3.0, 3.0, 3.0 + 1e-6]])
def test_what_says_nothing_of_what_came_has_no_slope(values):
    came = [np.array([1.0, 2.0]), np.array([4.0])]
    assert value_slope([np.array(values[:2]), np.array(values[2:])], came) == 0.0


def test_what_came_by_monte_carlo_hangs_on_no_value():
    """Schulman et al. 2016: returns by GAE have the values in them, but where `trace` is 1."""
    horizon = Horizon(discount=0.97, trace=0.9)
    made = make_advantages(PPO, SCORES, AWAY, beta=BETA, groups=GROUPS, values=VALUES, horizon=horizon)
    wanted = dataclasses.replace(horizon, trace=1.0)
    whole = make_advantages(PPO, SCORES, AWAY, beta=BETA, groups=GROUPS, values=VALUES, horizon=wanted)
    np.testing.assert_allclose(np.concatenate(made.came), np.concatenate(whole.returns), atol=1e-12)
    assert np.abs(np.concatenate(made.returns) - np.concatenate(made.came)).max() > 1e-3


def test_a_price_rises_where_answers_are_too_far():
    assert next_beta(0.1, 12.0, 6.0, 10) == pytest.approx(0.1 * 1.02)
    assert next_beta(0.1, 5.4, 6.0, 10) == pytest.approx(0.1 * 0.99)
    assert next_beta(0.1, 6.0, 6.0, 10) == 0.1


@pytest.mark.parametrize('name', ['discount', 'trace'])
def test_a_horizon_out_of_range_is_refused(name):
    with pytest.raises(InputError, match=f'{name} is 1.5; it must be from 0 to 1'):
        Horizon(**{name: 1.5})
