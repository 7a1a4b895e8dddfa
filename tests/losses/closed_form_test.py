"""Answers of one token, preferred as often as known scores say (Bradley and Terry): where training must end."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.data.preferences import Answer, EncodedPair, PreferenceRows, collate_preferences
from llama_jax.losses.dpo import PreferenceLoss, preference_loss
from llama_jax.losses.reward import pair_scores, reward_loss
from llama_jax.train.state import new_state
from llama_jax.train.step import train_step
from tests import toy
from tests.losses.pairs_test import REWARD

pytestmark = pytest.mark.slow

PROMPT, ANSWERS, BETA = np.array([1, 5], np.int32), np.arange(10, 16, dtype=np.int32), 0.4
SCORES = np.random.default_rng(0).normal(size=len(ANSWERS))


@pytest.fixture(scope='module')
def batch():
    """Every pair of answers either way round, weighted by how often it comes so."""
    answers = [Answer(np.array([token]), np.array([True])) for token in ANSWERS]
    orders = list(itertools.permutations(range(len(ANSWERS)), 2))
    rows = PreferenceRows([EncodedPair(PROMPT, (answers[i], answers[j])) for i, j in orders], 48)
    often = [1 / (1 + np.exp(SCORES[j] - SCORES[i])) for i, j in orders]
    made = []
    for index in range(len(rows)):
        row, numbers = rows[index], rows.numbers(index)
        row['weights'][: len(numbers)] = [often[number] for number in numbers]
        made.append(row)
    return jax.tree.map(jnp.asarray, collate_preferences(made))


def trained(loss_fn, params, frozen, batch, num_steps):
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))
    step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=tx))
    state = new_state(params, tx)
    for _ in range(num_steps):
        state, _ = step(state, frozen, batch, jax.random.key(0))
    return state.params


def test_a_policy_ends_at_its_start_tilted_by_the_scores(batch):
    """pi0 exp(r / beta) / Z, over the answers in play; a sign, a factor or a lost reference would end elsewhere."""
    policy = toy.make_model()
    params = toy.make_params(policy)
    loss_fn = preference_loss(policy, PreferenceLoss(beta=BETA))
    after = trained(loss_fn, params, params, batch, 300)

    def law(params):
        logits, _ = policy.apply({'params': params}, jnp.array([PROMPT]))
        return np.asarray(jax.nn.softmax(logits[0, -1, ANSWERS]), np.float64)

    wanted = law(params) * np.exp(SCORES / BETA)
    wanted /= wanted.sum()
    assert 0.5 * np.abs(law(params) - wanted).sum() > 0.3  # far from where it began
    assert 0.5 * np.abs(law(after) - wanted).sum() < 0.05


def test_a_reward_model_finds_the_scores(batch):
    """Up to a constant, which no comparison tells."""
    after = trained(reward_loss(REWARD, margin='none'), toy.make_params(REWARD), {}, batch, 300)
    of_pairs = np.asarray(pair_scores(REWARD, after, batch))
    for row, place in np.argwhere(np.asarray(batch.weights) > 0):
        ends = np.asarray(batch.ends[row, place])
        first, second = (SCORES[np.searchsorted(ANSWERS, int(batch.tokens[row, end]))] for end in ends)
        found = of_pairs[row, place, 0] - of_pairs[row, place, 1]
        assert found == pytest.approx(first - second, abs=0.1)
