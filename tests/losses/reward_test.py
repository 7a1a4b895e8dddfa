import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.losses.reward import MARGINS, margin_scale, ranking_losses, safety_losses

RNG = np.random.default_rng()  # new numbers each time
SCORES = RNG.normal(0, 2, size=(3, 4, 2))
MARGIN = RNG.choice([0.0, 1.0, 2.0, 3.0], size=(3, 4))


def log_sigmoid(x):
    """In float64; no number here is so large that it would need care."""
    return -np.log1p(np.exp(-np.asarray(x, np.float64)))


@pytest.mark.parametrize('centering', [0.0, 0.01])
def test_ranking_losses_are_the_formula_in_float64(centering):
    found = ranking_losses(jnp.float32(SCORES), jnp.float32(MARGIN), centering)
    better, worse = np.float32(SCORES[..., 0]).astype(float), np.float32(SCORES[..., 1]).astype(float)
    wanted = -log_sigmoid(better - worse - MARGIN) + centering * (better + worse) ** 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)  # a few operations in fp32


def test_a_margin_is_the_papers():
    """Llama 2 paper, table 27."""
    ratings = np.array([3.0, 2.0, 1.0, 0.0])
    np.testing.assert_allclose(ratings * MARGINS['large'], [3, 2, 1, 0])
    np.testing.assert_allclose(ratings * MARGINS['small'], [1, 2 / 3, 1 / 3, 0])
    assert MARGINS['none'] == 0
    with pytest.raises(InputError, match="unknown margin 'big'; choose from none, small, large"):
        margin_scale('big')


def test_safety_losses_are_the_formula_in_float64():
    safe = np.array([[[1, 0], [0, 1], [-1, 1], [-1, -1]]], np.int32)
    scores = SCORES[:1]
    found = safety_losses(jnp.float32(scores), jnp.asarray(safe))
    signed = np.where(safe == 1, 1.0, -1.0) * np.float32(scores).astype(float)
    wanted = np.mean(np.where(safe >= 0, -log_sigmoid(signed), 0.0), axis=-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert found[0, 3] == 0


def test_scores_far_apart_stay_finite():
    scores = jnp.array([[[1e4, -1e4], [-1e4, 1e4]]])
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(ranking_losses(s, jnp.zeros((1, 2)))))(scores)
    assert value == 2e4
    np.testing.assert_array_equal(gradient, [[[0, 0], [-1, 1]]])
