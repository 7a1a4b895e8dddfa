"""The one einsum: dtype of the computation, of the accumulator and of the gradients."""

import jax
import jax.numpy as jnp
import numpy as np

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
