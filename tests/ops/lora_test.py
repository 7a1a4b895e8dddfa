"""A weight with an adapter: the products of base + scale a b, and nothing at all where b is 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import linear
from llama_jax.ops.lora import LoraArray
from llama_jax.ops.quantized import quantize_array

KINDS = [
    ('btd,dnh->btnh', (2, 3, 8), (8, 3, 4), (-3,)),
    ('btnh,nhd->btd', (2, 3, 3, 4), (3, 4, 8), (-3, -2)),
    ('btd,df->btf', (2, 3, 8), (8, 12), (-2,)),
    ('btd,vd->btv', (2, 3, 8), (12, 8), (-1,)),  # the head
    ('btd,vd->btv', (2, 3, 8), (12, 8), (-2,)),  # the embedding, as a head
]


def adapter(weight: tuple[int, ...], axes: tuple[int, ...], rank: int = 2):
    rng = np.random.default_rng(1)
    summed = [weight[axis] for axis in axes]
    others = [size for axis, size in enumerate(weight) if axis - len(weight) not in axes]
    a, b = rng.standard_normal((*summed, rank)), rng.standard_normal((rank, *others))
    delta = np.tensordot(a, b, 1)  # the axes summed over, then the others
    order = [axis for axis in axes] + [
        axis - len(weight) for axis in range(len(weight)) if axis - len(weight) not in axes
    ]
    return jnp.float32(a), jnp.float32(b), np.moveaxis(delta, range(len(weight)), order)


@pytest.mark.parametrize(('equation', 'of_x', 'of_weight', 'axes'), KINDS)
def test_products_are_those_of_the_sum(equation, of_x, of_weight, axes):
    rng = np.random.default_rng(0)
    x, base = rng.standard_normal(of_x), rng.standard_normal(of_weight)
    a, b, delta = adapter(of_weight, axes)
    weight = LoraArray(jnp.float32(base), a, b, scale=0.5, axes=axes)
    assert isinstance(weight, linear.Representation) and weight.shape == of_weight
    whole = base + 0.5 * delta
    # float32 rounds products of unit values by 6e-8 each
    np.testing.assert_allclose(weight.materialize(), whole, atol=2e-6)
    np.testing.assert_allclose(
        linear.einsum(equation, jnp.float32(x), weight), np.einsum(equation, x, whole), atol=1e-5
    )
    stacked = LoraArray(*(jnp.stack([w, w]) for w in (jnp.float32(base), a, b)), scale=0.5, axes=axes)
    np.testing.assert_allclose(stacked.materialize()[1], whole, atol=2e-6)


def test_rows_are_those_of_the_sum():
    base, rows = np.random.default_rng(0).standard_normal((12, 8)), jnp.array([[3, 0, 11], [7, 7, 1]])
    a, b, delta = adapter((12, 8), (-2,))
    weight = LoraArray(jnp.float32(base), a, b, scale=0.5, axes=(-2,))
    np.testing.assert_allclose(linear.take(weight, rows, jnp.float32), (base + 0.5 * delta)[rows], atol=2e-6)


@pytest.mark.parametrize('quantized', [False, True])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_an_adapter_whose_b_is_0_changes_no_bit(quantized, dtype):
    x, base = (jax.random.normal(jax.random.key(i), (40, 40)) for i in range(2))
    base = quantize_array(base, 'int8', (0,)) if quantized else base.astype(dtype)
    a, b, _ = adapter((40, 40), (-2,))
    weight = LoraArray(base, a, jnp.zeros_like(b), axes=(-2,))
    found, wanted = (linear.einsum('td,df->tf', x.astype(dtype), w) for w in (weight, base))
    np.testing.assert_array_equal(found, wanted)


def test_dropout_keeps_the_mean_and_leaves_the_base_alone():
    x, base = jnp.ones((4000, 8)), jnp.ones((8, 3))
    a, b = jnp.ones((8, 1)) / 8, jnp.ones((1, 3))

    def products(a, key):
        weight = LoraArray(base, a, b, key=key, axes=(-2,), dropout=0.25)
        return linear.einsum('td,df->tf', x, weight)

    y = products(a, jax.random.key(0)) - 8
    assert float(y.std()) > 0.1
    # the mean of 32,000 draws of 0 or 4/3: standard error 0.0032
    assert abs(float(y.mean()) - 1) < 0.013
    np.testing.assert_array_equal(products(a, None), jnp.full((4000, 3), 9))
    np.testing.assert_array_equal(products(0 * a, jax.random.key(0)), jnp.full((4000, 3), 8))
