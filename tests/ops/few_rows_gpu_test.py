"""The kernel for few activations and a matrix of int8: interpreted, and on a GPU through the weight's own product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import linear
from llama_jax.ops.few_rows_gpu import few_rows_product, fits
from llama_jax.ops.quantized import QuantizedArray


@pytest.mark.parametrize('rows', [1, 4])
def test_the_product_is_exact_but_for_sums_in_float32(rows):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 512)), jnp.bfloat16)
    codes = jnp.asarray(rng.integers(-128, 128, size=(512, 768)), jnp.int8)
    assert fits(x, codes)
    found = few_rows_product(x, codes, interpret=True)
    wanted = np.asarray(x, np.float64) @ np.asarray(codes, np.float64)
    np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize(
    ('shape', 'columns', 'dtype'),
    [((3, 512), 768, 'int8'), ((1, 500), 768, 'int8'), ((1, 512), 700, 'int8'), ((1, 512), 768, 'int4')],
)
def test_other_shapes_are_left_to_the_compiler(shape, columns, dtype):
    assert not fits(jnp.zeros(shape), jnp.zeros((shape[1], columns), dtype))


@pytest.mark.accelerator
@pytest.mark.filterwarnings('ignore:The Pallas Triton backend')
@pytest.mark.parametrize(
    ('equation', 'x', 'codes', 'scale'),
    [
        ('btd,df->btf', (2, 1, 512), (512, 11008), (1, 11008)),
        ('btd,dnh->btnh', (1, 1, 4096), (4096, 8, 128), (1, 8, 128)),
        ('btnh,nhd->btd', (4, 1, 8, 128), (8, 128, 4096), (1, 1, 4096)),
    ],
)
def test_on_a_device_it_is_as_the_compilers(equation, x, codes, scale):
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-127, 128, size=codes), jnp.int8)
    weight = QuantizedArray(codes, jnp.asarray(rng.uniform(0.5, 1, size=scale), jnp.float32))
    x = jnp.asarray(rng.normal(size=x), jnp.bfloat16)
    found = jax.jit(lambda x, weight: linear.einsum(equation, x, weight, jnp.float32))(x, weight)
    wanted = np.einsum(equation, np.asarray(x, np.float64), np.asarray(weight.materialize(), np.float64))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
