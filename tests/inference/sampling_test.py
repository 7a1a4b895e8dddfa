import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.inference.sampling import Sampler
from llama_jax.types import InputError

PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3], np.float32)  # most likely first: 1, 3, 0, 2
DRAWS = 4000


def draw(sampler, probabilities=PROBABILITIES, seed=0):
    """How often each token is drawn."""
    logits = jnp.log(jnp.broadcast_to(probabilities, (DRAWS, len(probabilities)))) + 3.0
    tokens = np.asarray(sampler(logits, jax.random.key(seed)))
    return np.bincount(tokens, minlength=len(probabilities)) / DRAWS


def expect(sampler, kept):
    """Tokens in `kept` are drawn as their renormalised probabilities say, and no other."""
    kept_mass = np.where(np.isin(np.arange(4), kept), PROBABILITIES, 0.0)
    wanted = kept_mass / kept_mass.sum()
    found = draw(sampler)
    assert set(np.flatnonzero(found)) == set(kept)
    np.testing.assert_allclose(found, wanted, atol=0.04)  # 5 standard deviations of 4000 draws


def test_temperature_zero_takes_the_most_likely():
    logits = jax.random.normal(jax.random.key(0), (5, 9))
    np.testing.assert_array_equal(Sampler()(logits, jax.random.key(1)), np.argmax(logits, axis=-1))


def test_all_tokens_are_drawn_by_their_probabilities():
    expect(Sampler(temperature=1.0), [0, 1, 2, 3])


def test_temperature_divides_the_logits():
    found = draw(Sampler(temperature=2.0))
    np.testing.assert_allclose(found, PROBABILITIES**0.5 / np.sum(PROBABILITIES**0.5), atol=0.04)


@pytest.mark.parametrize(
    ('top_k', 'kept'), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_most_likely(top_k, kept):
    expect(Sampler(temperature=1.0, top_k=top_k), kept)


# Sums of the most likely: 0.5, 0.8, 0.95, 1. The token that crosses the threshold stays.
@pytest.mark.parametrize(
    ('top_p', 'kept'),
    [(1e-6, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.96, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_token_that_crosses_it(top_p, kept):
    expect(Sampler(temperature=1.0, top_p=top_p), kept)


def test_top_p_sees_the_distribution_after_temperature():
    # Roots of the probabilities: 0.21, 0.38, 0.12, 0.29. So 0.51 now needs two, and 0.7 three.
    assert set(np.flatnonzero(draw(Sampler(temperature=2.0, top_p=0.7)))) == {0, 1, 3}
    assert set(np.flatnonzero(draw(Sampler(temperature=1.0, top_p=0.7)))) == {1, 3}


def test_each_row_is_filtered_by_itself():
    rows = np.stack([PROBABILITIES, PROBABILITIES[::-1]])
    logits = jnp.log(jnp.tile(rows, (500, 1)))
    tokens = np.asarray(Sampler(temperature=1.0, top_p=0.6)(logits, jax.random.key(0)))
    assert set(tokens[::2]) == {1, 3} and set(tokens[1::2]) == {0, 2}


def test_seeds_are_reproducible():
    sampler = Sampler(temperature=1.0, top_k=3, top_p=0.9)
    np.testing.assert_array_equal(draw(sampler, seed=1), draw(sampler, seed=1))
    assert np.any(draw(sampler, seed=1) != draw(sampler, seed=2))


@pytest.mark.parametrize(
    ('setting', 'words'),
    [
        ({'temperature': -0.1}, 'temperature is -0.1; it must be 0'),
        ({'top_k': -1}, 'top_k is -1; it must be 0'),
        ({'top_p': 0.0}, 'top_p is 0.0; it must be above 0'),
        ({'top_p': 1.5}, 'top_p is 1.5; it must be above 0 and at most 1'),
        ({'temperature': float('nan')}, 'temperature is nan'),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(setting, words):
    with pytest.raises(InputError) as error:
        Sampler(**setting)
    assert words in str(error.value) and '\n' not in str(error.value)
