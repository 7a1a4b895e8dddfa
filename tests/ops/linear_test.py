"""The one einsum: dtype of the computation, of the accumulator and of the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops.linear import einsum


def test_values_and_gradients():
    rng = np.random.default_rng(0)
    x, weight, cotangent = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 3, 8), (8, 4, 5), (2, 3, 4, 5))
    )

    y, vjp = jax.vjp(lambda x, w: einsum('btd,dnh->btnh', x, w), jnp.asarray(x), jnp.asarray(weight))
    x_gradient, weight_gradient = vjp(jnp.asarray(cotangent))

    x, weight, cotangent = (a.astype(np.float64) for a in (x, weight, cotangent))
    for actual, expected in [
        (y, np.einsum('btd,dnh->btnh', x, weight)),
        (x_gradient, np.einsum('btnh,dnh->btd', cotangent, weight)),
        (weight_gradient, np.einsum('btd,btnh->dnh', x, cotangent)),
    ]:
        np.testing.assert_allclose(
            actual, expected, rtol=1e-5, atol=1e-5
        )  # sums of up to 20 products of size 1


def test_master_weights_are_cast_to_the_activations_but_their_gradient_is_never_rounded():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 64)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)

    y, vjp = jax.vjp(lambda x, w: einsum('td,df->tf', x, w), x, weight)
    x_gradient, weight_gradient = vjp(y)

    assert (y.dtype, x_gradient.dtype, weight_gradient.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = np.asarray(x, np.float64).T @ np.asarray(y, np.float64)
    np.testing.assert_allclose(
        weight_gradient, expected, atol=1e-4
    )  # fp32 sums of size 30; bf16 is off by 0.1


def test_output_dtype_is_the_accumulator_not_a_late_cast():
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((16, 256), (256, 64)))

    y = einsum('td,df->tf', x, weight, output_dtype=jnp.float32)

    assert y.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(y, expected, atol=1e-4)  # fp32 sums of size 16; a bf16 result is off by 0.06


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    ('equation', 'sizes'),
    [
        ('btd,df->btf', {'d': 900, 'f': 700}),  # two tiles and a rest
        ('btd,dnh->btnh', {'d': 800, 'n': 8, 'h': 90}),
        ('btgh,ghd->btd', {'g': 16, 'h': 60, 'd': 701}),
        ('btd,vd->btv', {'v': 1501, 'd': 400}),
    ],
)
def test_few_rows_meet_weights_of_16_bits_tile_by_tile_on_a_cpu(equation, sizes, dtype):
    of_x, of_weight = equation.split('->')[0].split(',')
    sizes = {'b': 2, 't': 3} | sizes
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=[sizes[a] for a in of_x]), dtype)
    weight = jnp.asarray(rng.normal(size=[sizes[a] for a in of_weight]), jnp.bfloat16)
    program = jax.jit(lambda x, weight: einsum(equation, x, weight))
    y = program(x, weight)
    want = np.einsum(equation, *(np.asarray(a, np.float64) for a in (x, weight)))
    assert y.dtype == x.dtype
    # Sums are fp32; in bfloat16 the result alone is rounded, to 8 bits.
    tolerance = 1e-5 if dtype == 'float32' else 2**-8
    np.testing.assert_allclose(
        np.asarray(y, np.float64), want, rtol=tolerance, atol=1e-5 * np.abs(want).max()
    )
    if jax.default_backend() == 'cpu':
        temporary = program.lower(x, weight).compile().memory_analysis().temp_size_in_bytes
        assert temporary < 2 * weight.nbytes  # an fp32 copy of it would be twice its size


def test_a_weight_of_16_bits_has_its_gradients_tile_by_tile_too():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(8, 5)), jnp.bfloat16)
    found = jax.grad(lambda x: jnp.sum(jnp.sin(einsum('td,df->tf', x, weight))))(x)
    want = jax.grad(lambda x: jnp.sum(jnp.sin(x @ weight.astype(jnp.float32))))(x)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
