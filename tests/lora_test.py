"""Adapters beside a frozen base: what is trained, what stays as it is, and what the two make together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.lora import (
    LoraConfig,
    abstract_adapters,
    combine,
    init_adapters,
    merge,
    with_base,
)
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import abstract_params_and_axes
from llama_jax.ops import linear
from tests import toy

EVERYTHING = LoraConfig(rank=4, alpha=6.0, targets=('all', 'embed', 'head'), train_whole=('norms',))


@pytest.fixture(scope='module')
def base():
    return toy.make_params(toy.make_model())


def random_adapters(config, base, seed=1):
    """Adapters that change the model, with no part that is 0; weights that are trained whole too."""
    made = init_adapters(config, base, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return structure.unflatten(
        [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def test_shapes_and_axes_are_the_weights_own():
    shapes, axes = abstract_adapters(EVERYTHING, *abstract_params_and_axes(toy.make_model()))
    own, placed = shapes['blocks']['attention'], axes['blocks']['attention']
    assert own['q']['a'].shape == (3, 32, 4) and placed['q']['a'] == ('layers', 'embed', None)
    assert own['q']['b'].shape == (3, 4, 8, 8) and placed['q']['b'] == ('layers', None, 'heads', 'head_dim')
    assert own['o']['a'].shape == (3, 8, 8, 4) and placed['o']['a'] == ('layers', 'heads', 'head_dim', None)
    assert own['o']['b'].shape == (3, 4, 32) and placed['o']['b'] == ('layers', None, 'embed')
    assert shapes['embed']['a'].shape == (64, 4) and axes['embed']['a'] == ('vocab', None)
    assert shapes['head']['a'].shape == (32, 4) and axes['head'] == {
        'a': ('embed', None),
        'b': (None, 'vocab'),
    }
    assert shapes['final_norm'].shape == (32,) and 'norm' in axes['blocks']['mlp_norm']
    made = jax.eval_shape(
        lambda: init_adapters(EVERYTHING, toy.make_params(toy.make_model()), jax.random.key(0))
    )
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, shapes)


def test_at_first_nothing_is_changed_by_a_bit(base):
    adapters = init_adapters(EVERYTHING, base, jax.random.key(0))
    tokens = toy.packed_batch(2, 16).tokens
    model = toy.make_model()
    found, wanted = (
        jax.jit(lambda p: model.apply({'params': p}, tokens)[0])(p)
        for p in (combine(adapters, base, EVERYTHING.scale), base)
    )
    np.testing.assert_array_equal(found, wanted)
    a = adapters['blocks']['mlp']['down']['a']  # of 64 inputs
    assert float(jnp.abs(a).max()) <= 1 / 8 and float(a.std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


def test_merged_is_the_adapter_beside_the_base(base):
    adapters, tokens = random_adapters(EVERYTHING, base), toy.packed_batch(2, 16).tokens
    model = toy.make_model()
    apply = jax.jit(lambda p: model.apply({'params': p}, tokens)[0])
    merging = jax.jit(functools.partial(merge, scale=EVERYTHING.scale))
    beside, merged = apply(combine(adapters, base, EVERYTHING.scale)), apply(merging(adapters, base))
    np.testing.assert_allclose(beside, merged, rtol=1e-5, atol=1e-5 * float(jnp.abs(merged).max()))
    assert float(jnp.abs(merged - apply(base)).max()) > 0.1
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), base)
    rounded = merging(adapters, narrow)['blocks']['attention']['q']
    whole = combine(adapters, narrow, EVERYTHING.scale)['blocks']['attention']['q'].materialize()
    assert whole.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, whole.astype(jnp.bfloat16))  # rounded once


def test_gradients_are_those_of_the_whole_weights_and_of_adapters_alone(base):
    adapters, batch = random_adapters(EVERYTHING, base), toy.packed_batch(4, 16)
    loss_fn = language_model_loss(toy.make_model(), num_chunks=2)
    beside = with_base(loss_fn, EVERYTHING)

    def gradients(adapters, base):
        def loss(adapters, fn, *rest):
            return fn(adapters, *rest, batch, jax.random.key(0))[0]

        def merged_loss(adapters, *rest):
            return loss_fn(merge(adapters, base, EVERYTHING.scale), *rest)

        return jax.grad(loss)(adapters, beside, base), jax.grad(loss)(adapters, merged_loss, {})

    toy.assert_same_gradients(*jax.jit(gradients)(adapters, base))


def one_product(params, frozen, batch, rng):
    """A loss of one weight of each layer."""
    del frozen, rng
    layers = (jax.tree.map(lambda leaf: leaf[i], params['blocks']['mlp']['up']) for i in range(3))  # noqa: B023
    losses = jnp.array([jnp.sum(linear.einsum('btd,df->btf', batch, up) ** 2) for up in layers])
    return losses.sum(), jnp.float32(1), {}


def test_dropout_is_for_training_alone_and_new_at_every_step(base):
    config = LoraConfig(rank=4, dropout=0.5, targets=('up', 'gate'))
    adapters, x = random_adapters(config, base), jax.random.normal(jax.random.key(3), (2, 4, 32))
    loss_fn = with_base(one_product, config)
    losses = [float(loss_fn(adapters, base, x, jax.random.key(i))[0]) for i in (0, 0, 1)]
    without = float(one_product(combine(adapters, base, config.scale), {}, x, None)[0])
    assert losses[0] == losses[1] and len({*losses, without}) == 3
    keys = combine(adapters, base, 1.0, dropout=0.5, key=jax.random.key(0))['blocks']['mlp']
    drawn = np.concatenate([jax.random.key_data(keys[name].key) for name in ('up', 'gate')])
    assert len(np.unique(drawn, axis=0)) == 6  # one for each weight and layer


def test_a_loss_with_a_reference_is_given_the_base_without_adapters(base):
    config = LoraConfig(rank=2, dropout=0.5, targets=('up',))
    adapters, x = random_adapters(config, base), jnp.ones((1, 2, 32))

    def beside_reference(params, frozen, batch, rng):
        policy, reference = (one_product(weights, {}, batch, rng)[0] for weights in (params, frozen))
        return policy - reference, reference, {}

    difference, reference, _ = with_base(beside_reference, config)(adapters, base, x, jax.random.key(0))
    assert float(reference) == float(one_product(base, {}, x, None)[0]) and float(difference) != 0


def test_layers_without_adapter_keep_theirs_at_0(base):
    config = LoraConfig(rank=2, layers=(1,), targets=('up',))
    adapters, x = init_adapters(config, base, jax.random.key(0)), jnp.ones((1, 2, 32))
    loss_fn = with_base(one_product, config)
    gradients = jax.grad(lambda adapters: loss_fn(adapters, base, x, jax.random.key(0))[0])(adapters)
    assert [bool(layer.any()) for layer in gradients['blocks']['mlp']['up']['b']] == [False, True, False]


def test_scale():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rslora=True).scale == 2


@pytest.mark.parametrize(
    ('settings', 'line'),
    [
        ({'rank': 0}, 'rank is 0; it must be at least 1'),
        ({'alpha': float('nan')}, 'alpha is nan; it must be above 0 and finite'),
        ({'dropout': 1.0}, 'dropout is 1.0; it must be from 0 to below 1'),
        ({'targets': ('gates',)}, "targets has 'gates', which is no such weight; did you mean gate"),
        ({'targets': (), 'train_whole': ()}, 'targets and train_whole are both empty'),
        ({'targets': ('embed',), 'train_whole': ('embed',)}, "targets and train_whole both have 'embed'"),
        ({'layers': (3,)}, 'layers has 3; the model has the layers 0 to 2'),
        ({'train_whole': ('score',)}, "train_whole has 'score', which the model does not have"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, line):
    with pytest.raises(InputError, match=line):
        abstract_adapters(LoraConfig(**settings), *abstract_params_and_axes(toy.make_model()))
