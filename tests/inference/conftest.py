"""The toy model, its weights and what it says of any tokens, once for all files: they share its programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy


@pytest.fixture(scope='session')
def model():
    return toy.make_model()


@pytest.fixture(scope='session')
def params(model):
    return toy.make_params(model)


@pytest.fixture(scope='session')
def logits_of(model, params):
    """Logits behind each of some tokens, by reading all of them at once, without a cache."""
    read = jax.jit(lambda row: model.apply({'params': params}, row)[0])

    def logits(tokens):
        # Padding comes after all that is read, so one shape serves.
        row = jnp.array([[*tokens, *[0] * (toy.CONFIG.max_seq_len - len(tokens))]], jnp.int32)
        return np.asarray(read(row), np.float64)[0, : len(tokens)]

    return logits
