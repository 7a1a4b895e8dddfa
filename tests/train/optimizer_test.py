import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.lm_batch import lm_batch
from llama_jax.errors import InputError
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import abstract_params, abstract_params_and_axes, init_params
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.optimizer import (
    OPTIMIZERS,
    OptimizerConfig,
    at_rate,
    decayed,
    make_optimizer,
    make_schedule,
)
from llama_jax.train.state import abstract_state, new_state
from llama_jax.train.step import train_step
from tests import toy

RECIPE = OptimizerConfig(learning_rate=1.0, warmup_steps=10)


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    schedule = make_schedule(RECIPE, 100)
    rates = [float(schedule(count)) for count in range(100)]  # of update count + 1
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[54] == pytest.approx(0.55)  # half way down: (1 + 0.1) / 2
    assert rates[99] == pytest.approx(0.1)
    assert float(schedule(1000)) == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in zip(rates[9:], rates[10:], strict=False))
    assert float(make_schedule(dataclasses.replace(RECIPE, warmup_steps=0), 100)(0)) == pytest.approx(
        1.0, rel=1e-3
    )


def test_a_run_shorter_than_its_warmup_warms_up_over_its_first_tenth():
    rates = [float(make_schedule(RECIPE, 10)(count)) for count in range(10)]
    assert rates[0] == max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert float(make_schedule(RECIPE, 1)(0)) == pytest.approx(0.1)  # one step is the end of the cosine


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(InputError, match=r'num_steps is 0; it must be at least 1'):
        make_schedule(RECIPE, 0)
    with pytest.raises(InputError, match=r"name is 'sgd', which is no optimizer; choose from \('adamw'"):
        dataclasses.replace(RECIPE, name='sgd')


@pytest.mark.parametrize(
    ('name', 'value'),
    [('learning_rate', 0.0), ('learning_rate', math.nan), ('learning_rate', math.inf), ('warmup_steps', -1),
     ('final_fraction', 1.5), ('beta1', 1.0), ('beta2', -0.1), ('beta2', math.nan), ('eps', -1e-8),
     ('weight_decay', -0.1), ('clip_norm', -1.0), ('clip_norm', math.nan)],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=rf'^{name} is {value}; it must be '):
        dataclasses.replace(RECIPE, **{name: value})


def test_norms_alone_do_not_decay():
    mask = jax.tree_util.tree_leaves_with_path(decayed(abstract_params(toy.make_model())))
    spared = {jax.tree_util.keystr(path, simple=True, separator='/') for path, value in mask if not value}
    assert spared == {'final_norm', 'blocks/attention_norm', 'blocks/mlp_norm'}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_decay_is_the_learning_rate_times_the_weight(name):
    """Without a gradient, decay is all that an update does."""
    tx = make_optimizer(OptimizerConfig(name=name, weight_decay=0.1), 1e-2)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), abstract_params(toy.make_model()))

    @jax.jit
    def update(params):
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]

    wanted = jax.tree.map(lambda decays: -1e-2 * 0.1 * 2.0 if decays else 0.0, decayed(params))
    jax.tree.map(
        lambda found, want: np.testing.assert_allclose(found, want, rtol=1e-5), update(params), wanted
    )


def test_gradients_are_clipped_to_the_global_norm():
    params = {'a': jnp.zeros(2), 'b': jnp.zeros(1)}
    # With this epsilon an update is nearly proportional to its gradient: Adam would hide its size else.
    config = OptimizerConfig(eps=1e3, weight_decay=0.0, clip_norm=1.0)

    def update(gradients, **changes):
        tx = make_optimizer(dataclasses.replace(config, **changes), 1.0)
        return tx.update(gradients, tx.init(params), params)[0]

    large = {'a': jnp.array([6.0, 0.0]), 'b': jnp.array([8.0])}  # norm 10
    clipped = jax.tree.map(lambda g: g / 10, large)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, update(large), update(clipped, clip_norm=0.0))
    jax.tree.map(close, update(clipped, clip_norm=5.0), update(clipped, clip_norm=0.0))
    assert np.abs(update(large, clip_norm=0.0)['b']) > 5 * np.abs(update(large)['b'])


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_one_part_learns_at_a_rate_of_its_own(name):
    """Decay among it: as if its learning rate were so many times as high, from a state of the same shape."""
    params = {part: {'q': jnp.full((2, 4, 4), 2.0)} for part in ('policy', 'value')}
    gradients = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape), params
    )
    config = OptimizerConfig(name=name, weight_decay=0.1)
    one, ten = (make_optimizer(config, rate) for rate in (1e-3, 1e-2))
    mixed = at_rate(one, 'value', 10.0)

    def update(tx):
        return tx.update(gradients, tx.init(params), params)[0]

    jax.tree.map(np.testing.assert_array_equal, mixed.init(params), one.init(params))
    np.testing.assert_array_equal(update(mixed)['policy']['q'], update(one)['policy']['q'])
    np.testing.assert_allclose(update(mixed)['value']['q'], update(ten)['value']['q'], rtol=1e-5)


def successor_batch(seed):
    """After x comes 3 x + 1: learnt from the last token alone."""
    text = [np.random.default_rng(seed).integers(64, size=8)]
    for _ in range(16):
        text.append((3 * text[-1] + 1) % 64)
    tokens = np.stack(text, axis=1).astype(np.int32)
    return jax.tree.map(jnp.asarray, lm_batch(tokens, np.ones_like(tokens)))


@pytest.mark.parametrize(
    ('name', 'learning_rate'),
    [
        ('adamw', 1e-2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [('adafactor', 1e-2), ('lion', 4e-3), ('muon', 2e-2)]
        ),
    ],
)
def test_every_optimizer_learns(name, learning_rate):
    config = OptimizerConfig(name=name, learning_rate=learning_rate, warmup_steps=5)
    model, tx = toy.make_model(), make_optimizer(config, make_schedule(config, 60))
    state = jax.jit(lambda key: new_state(init_params(model, key), tx))(jax.random.key(0))
    step = jax.jit(functools.partial(train_step, loss_fn=language_model_loss(model), tx=tx))
    losses = []
    for index in range(60):
        state, metrics = step(state, {}, successor_batch(index), jax.random.key(0))
        losses.append(float(metrics['loss']))
    assert losses[0] == pytest.approx(math.log(64), rel=0.05)  # nothing known yet
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_muon_turns_both_parts_of_an_adapter():
    """All singular values of an update are about 1, of the matrices that the parts are in each layer."""
    adapters = {
        'blocks': {'attention': {'o': {'a': jnp.zeros((2, 4, 8, 3)), 'b': jnp.zeros((2, 3, 32))}}},
        'embed': {'a': jnp.zeros((64, 3)), 'b': jnp.zeros((3, 32))},
    }
    tx = make_optimizer(OptimizerConfig(name='muon', weight_decay=0.0, clip_norm=0.0), 1.0)
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), adapters)
    updates = jax.jit(lambda g: tx.update(g, tx.init(adapters), adapters)[0])(gradients)
    own = updates['blocks']['attention']['o']
    for matrix in (*own['a'].reshape(2, 32, 3), *own['b']):
        values = np.linalg.svd(matrix, compute_uv=False)
        # Five steps of Newton-Schulz leave them between 0.68 and 1.13 of the scale for a matrix of this shape.
        assert values.min() > 0.6 * values.max()
    assert float(jnp.ptp(jnp.abs(updates['embed']['b']))) < 1e-3  # Adam's first step: signs


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_moments_lie_as_their_weights_do(name):
    tx = make_optimizer(OptimizerConfig(name=name), 1e-3)
    partitioner = Partitioner(make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
    state = abstract_state(*abstract_params_and_axes(toy.make_model()), tx, partitioner)
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    for path, weight in jax.tree_util.tree_leaves_with_path(state.params):
        mine = [leaf for where, leaf in moments if _ends_with(where, path) and leaf.shape == weight.shape]
        assert 1 <= len(mine) <= 2, path
        assert all(leaf.sharding == weight.sharding for leaf in mine), path
    # All else is small: counters, placeholders, coefficients.
    sizes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    assert all(leaf.size <= 3 for _, leaf in moments if leaf.shape not in sizes)


def _ends_with(path, suffix) -> bool:
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return keys[-len(suffix) :] == [entry.key for entry in suffix]


def test_factored_moments_are_kept_whole():
    tx = make_optimizer(OptimizerConfig(name='adafactor'), 1e-3)
    wide = toy.make_model().clone(config=dataclasses.replace(toy.CONFIG, embed_dim=128, mlp_dim=256))
    state = abstract_state(
        *abstract_params_and_axes(wide), tx, Partitioner(make_mesh({'fsdp': 4, 'tensor': 2}))
    )
    factored = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (3, 256)]
    assert factored and all(leaf.sharding.is_fully_replicated for leaf in factored)
