import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.losses.language_model import language_model_loss
from llama_jax.train.state import new_state
from llama_jax.train.step import train_step
from tests import toy


@pytest.fixture(scope='module')
def model():
    return toy.make_model()


@pytest.fixture(scope='module')
def params(model):
    return toy.make_params(model)


@pytest.fixture(scope='module')
def batch():
    return toy.packed_batch(8, 12)


@pytest.fixture(scope='module')
def whole(model, params, batch):
    """State and metrics after a step of the whole batch."""
    return run(language_model_loss(model), params, batch)


def run(loss_fn, params, batch, num_microbatches=1, step=0, how=jax.jit):
    state = new_state(params, toy.KEEP_GRADIENTS).replace(step=jnp.int32(step))
    update = functools.partial(
        train_step, loss_fn=loss_fn, tx=toy.KEEP_GRADIENTS, num_microbatches=num_microbatches
    )
    return how(update)(state, {}, batch, jax.random.key(0))


def test_the_loss_is_the_mean_over_counted_tokens(model, params, batch, whole):
    state, metrics = whole
    apply = jax.jit(model.apply)
    logits, _ = apply({'params': params}, batch.tokens, batch.positions, batch.segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    assert metrics['weight'] == np.sum(batch.loss_mask) < batch.tokens.size
    assert metrics['loss'] == pytest.approx(
        float(np.mean(losses[batch.loss_mask])), rel=1e-5
    )  # fp32 sums of 80 terms
    assert metrics['grad_norm'] == pytest.approx(float(optax.tree_utils.tree_norm(state.opt_state)), rel=1e-5)
    assert state.step == 1


@pytest.mark.parametrize('num_microbatches', [2, 4])
def test_microbatches_are_the_whole_batch_however_the_tokens_fall(
    model, params, batch, whole, num_microbatches
):
    # Row r is in microbatch r % n; odd rows are padded, so a mean of the microbatches' means would be another loss.
    counts = np.array([np.sum(batch.loss_mask[i::num_microbatches]) for i in range(num_microbatches)])
    assert counts.max() > 1.1 * counts.min()
    want_state, want = whole
    state, found = run(language_model_loss(model), params, batch, num_microbatches)
    # Sums in another order: fp32 rounds each term by 6e-8, and a gradient has thousands.
    for name in want:
        assert found[name] == pytest.approx(float(want[name]), rel=1e-5), name
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max()),
        state.opt_state, want_state.opt_state,
    )  # fmt: skip


@pytest.mark.parametrize('num_microbatches', [1, 2, 4])
def test_the_gradient_program_is_traced_once(model, params, batch, num_microbatches):
    """And so compiled once: a second copy for the first microbatch doubles the seconds of both."""
    traces = []
    language_model = language_model_loss(model)

    def loss_fn(*arguments):
        traces.append(arguments)
        return language_model(*arguments)

    run(
        loss_fn, params, batch, num_microbatches, how=lambda update: functools.partial(jax.eval_shape, update)
    )
    assert len(traces) == 1


def test_a_batch_without_a_counted_token_changes_nothing(model, params):
    batch = toy.packed_batch(2, 12)
    batch = batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask))
    state, metrics = run(language_model_loss(model), params, batch)
    assert metrics['loss'] == metrics['weight'] == metrics['grad_norm'] == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_every_step_and_microbatch_has_random_numbers_of_its_own():
    def loss_fn(params, frozen, batch, rng):
        draw = jax.random.uniform(rng)
        return params['w'] * draw, jnp.float32(1.0), {'square': draw**2}

    def draws(step, num_microbatches):
        _, metrics = run(loss_fn, {'w': jnp.float32(1.0)}, {'x': jnp.zeros(4)}, num_microbatches, step)
        return float(metrics['loss']), float(metrics['square'])

    assert draws(3, 1) == draws(3, 1) != draws(4, 1)
    mean, mean_square = draws(3, 2)
    assert mean_square - mean**2 > 1e-4  # their variance: the two differ


def test_frozen_reaches_the_loss_and_has_no_gradient():
    def loss_fn(params, frozen, batch, rng):
        return params['w'] * frozen['scale'], jnp.float32(1.0), {}

    state = new_state({'w': jnp.float32(2.0)}, toy.KEEP_GRADIENTS)
    state, metrics = train_step(
        state, {'scale': jnp.float32(5.0)}, {}, jax.random.key(0), loss_fn=loss_fn, tx=toy.KEEP_GRADIENTS
    )
    assert metrics['loss'] == 10.0 and state.opt_state == {'w': 5.0}
