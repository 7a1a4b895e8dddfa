import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.losses.dpo import LOSSES, PreferenceLoss, answer_sums, pair_losses
from tests.losses.reward_test import log_sigmoid

RNG = np.random.default_rng()  # new numbers each time
LENGTHS = RNG.integers(1, 30, size=(3, 4, 2)).astype(float)
POLICY, REFERENCE = (
    np.float32(-LENGTHS * RNG.uniform(0.05, 4, size=(3, 4, 2))).astype(float) for _ in range(2)
)
BASELINE = RNG.uniform(0, 5, size=(3, 4))


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def expected(loss: PreferenceLoss, present=None) -> np.ndarray:
    """From the papers, pair by pair, in float64."""
    beta, e = loss.beta, loss.label_smoothing
    losses = np.empty(POLICY.shape[:2])
    for index in np.ndindex(losses.shape):
        (pi_w, pi_l), (ref_w, ref_l), (len_w, len_l) = POLICY[index], REFERENCE[index], LENGTHS[index]
        h_w, h_l = pi_w - ref_w, pi_l - ref_l
        if loss.kind in ('sigmoid', 'robust'):
            right, wrong = -log_sigmoid(beta * (h_w - h_l)), -log_sigmoid(beta * (h_l - h_w))
            smoothed = (1 - e) * right + e * wrong
            losses[index] = (
                smoothed if loss.kind == 'sigmoid' else ((1 - e) * right - e * wrong) / (1 - 2 * e)
            )
        elif loss.kind == 'hinge':
            losses[index] = max(0.0, 1 - beta * (h_w - h_l))
        elif loss.kind == 'ipo':
            losses[index] = (h_w / len_w - h_l / len_l - 1 / (2 * beta)) ** 2
        elif loss.kind == 'sigmoid_norm':
            losses[index] = -log_sigmoid(beta * (h_w / len_w - h_l / len_l))
        elif loss.kind == 'simpo':
            losses[index] = -log_sigmoid(beta * (pi_w / len_w - pi_l / len_l) - loss.margin)
        elif loss.kind == 'orpo':
            odds = [np.exp(x) / (1 - np.exp(x)) for x in (pi_w / len_w, pi_l / len_l)]
            losses[index] = -pi_w / len_w - beta * log_sigmoid(np.log(odds[0] / odds[1]))
        else:
            both = (
                loss.desirable * (1 - sigmoid(beta * (h_w - BASELINE[index]))),
                loss.undesirable * (1 - sigmoid(beta * (BASELINE[index] - h_l))),
            )
            there = (True, True) if present is None else present[index]
            losses[index] = 0.5 * sum(x for x, is_there in zip(both, there, strict=True) if is_there)
    return losses


@pytest.mark.parametrize(
    'loss',
    [
        *map(PreferenceLoss, LOSSES),
        PreferenceLoss('sigmoid', beta=0.5, label_smoothing=0.1),
        PreferenceLoss('robust', beta=0.3, label_smoothing=0.2),
        PreferenceLoss('simpo', beta=2.0, margin=1.2),
        PreferenceLoss('kto', desirable=1.5, undesirable=0.5),
    ],
    ids=lambda loss: f'{loss.kind}-{loss.beta}-{loss.label_smoothing}',
)
def test_each_loss_is_its_papers_formula_in_float64(loss):
    found = pair_losses(
        loss,
        jnp.float32(POLICY),
        jnp.float32(REFERENCE),
        jnp.float32(LENGTHS),
        baseline=jnp.float32(BASELINE),
    )
    # Sums of up to 120 nats are rounded by 1e-5 before they are subtracted.
    np.testing.assert_allclose(found, expected(loss), rtol=2e-5, atol=2e-5)


def test_an_answer_that_is_judged_alone_counts_alone():
    present = RNG.random((3, 4, 2)) < 0.5
    loss = PreferenceLoss('kto')
    found = pair_losses(
        loss, jnp.float32(POLICY), jnp.float32(REFERENCE), jnp.float32(LENGTHS),
        present=jnp.asarray(present), baseline=jnp.float32(BASELINE),
    )  # fmt: skip
    np.testing.assert_allclose(found, expected(loss, present), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('kind', LOSSES)
def test_far_answers_have_finite_losses_and_gradients(kind):
    policy = jnp.array([[[-1e5, -1e-9], [0.0, -1e5]]])

    def total(policy):
        return jnp.sum(
            pair_losses(PreferenceLoss(kind), policy, jnp.zeros_like(policy), jnp.ones_like(policy))
        )

    value, gradient = jax.value_and_grad(total)(policy)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_an_answers_sum_is_over_its_own_tokens():
    values, segment_ids = (
        RNG.normal(size=(2, 9)),
        np.array([[1, 1, 1, 2, 2, 3, 3, 0, 0], [2, 2, 4, 4, 4, 4, 1, 1, 0]]),
    )
    segments = np.array([[[1, 2], [3, 1], [0, 0]], [[2, 4], [4, 1], [2, 0]]])
    found = answer_sums(jnp.float32(values), jnp.asarray(segment_ids), jnp.asarray(segments))
    for index in np.ndindex(segments.shape):
        wanted = (
            np.sum(values[index[0]][segment_ids[index[0]] == segments[index]]) if segments[index] else 0.0
        )
        assert found[index] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'kind': 'sigmod'}, "unknown loss 'sigmod'; did you mean sigmoid"),
        ({'beta': 0.0}, 'beta is 0.0; it must be a positive number'),
        ({'label_smoothing': 0.5}, 'label_smoothing is 0.5; it must be from 0 to below 0.5'),
        ({'kind': 'ipo', 'label_smoothing': 0.1}, 'label_smoothing is 0.1, and the loss ipo, which has none'),
        ({'margin': 0.5}, 'margin is 0.5, and the loss sigmoid, which has none'),
        (
            {'kind': 'kto', 'nll': 0.2},
            'nll is 0.2, and the loss kto, which has none; set it to 0, or choose sigmoid',
        ),
        (
            {'desirable': 2.0},
            'desirable is 2.0, and the loss sigmoid, which has none; set it to 1, or choose kto',
        ),
        ({'nll': -1.0}, 'nll is -1.0; it must be 0 or more'),
    ],
)
def test_constants_without_a_meaning_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PreferenceLoss(), **fields)
