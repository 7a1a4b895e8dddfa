"""RMSNorm against float64, and its order of operations in bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops.normalization import rms_norm


@pytest.mark.parametrize('scale', [1.0, 1e-3, 1e-5, 1e4])  # at 1e-3 the mean square is a tenth of epsilon
def test_values_and_gradients(scale):
    rng, eps = np.random.default_rng(0), 1e-5
    x = (rng.normal(size=(2, 3, 64)) * scale).astype(np.float32)
    weight = rng.normal(size=64).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)

    y, vjp = jax.vjp(lambda x, w: rms_norm(x, w, eps), x, weight)
    x_gradient, weight_gradient = vjp(jnp.asarray(cotangent))

    x, weight, cotangent = (a.astype(np.float64) for a in (x, weight, cotangent))
    r = 1 / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)
    g = cotangent * weight
    np.testing.assert_allclose(y, x * r * weight, rtol=1e-6)
    np.testing.assert_allclose(weight_gradient, (cotangent * x * r).sum((0, 1)), rtol=1e-5, atol=1e-6 * scale)
    # The two terms nearly cancel where a row's gradient is along x, hence a tolerance of their size.
    expected = r * g - x * r**3 * np.mean(x * g, -1, keepdims=True)
    np.testing.assert_allclose(x_gradient, expected, rtol=1e-5, atol=2e-6 * r.max())


def test_bf16_rounds_before_the_weight_and_not_inside_the_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 4096)).astype(jnp.bfloat16)
    weight = rng.normal(size=4096).astype(np.float32)

    y = rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5)

    x32 = x.astype(np.float32)
    exact = x32 / np.sqrt(np.mean(x32**2, -1, keepdims=True, dtype=np.float64) + 1e-5)
    as_meta = exact.astype(jnp.bfloat16) * weight.astype(jnp.bfloat16)
    weight_first = (exact * weight).astype(jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    # fp32 against float64 statistics may turn a rounding now and then; the other order turns many.
    assert np.mean(np.asarray(y) == as_meta) > 0.999
    assert np.mean(np.asarray(y) == weight_first) < 0.9
