"""The kernel for few activations and a matrix of int8: interpreted, and on a GPU through the weight's own product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import linear
from llama_jax.ops.few_rows_gpu import few_rows_product, fits
from llama_jax.ops.quantized import QuantizedArray, few_rows


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


CASES = [
    ('btd,df->btf', (2, 1, 512), (512, 1024), (1, 1024)),
    ('btd,dnh->btnh', (1, 1, 512), (512, 4, 64), (1, 4, 64)),
    ('btnh,nhd->btd', (4, 1, 4, 64), (4, 64, 512), (1, 1, 512)),
]


def arrays(x, codes, scale):
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-127, 128, size=codes), jnp.int8)
    weight = QuantizedArray(codes, jnp.asarray(rng.uniform(0.5, 1, size=scale), jnp.float32))
    return jnp.asarray(rng.normal(size=x), jnp.bfloat16), weight


def is_right(equation, x, weight, found):
    wanted = np.einsum(equation, np.asarray(x, np.float64), np.asarray(weight.materialize(), np.float64))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)  # sums in float32


@pytest.mark.parametrize(('equation', 'x', 'codes', 'scale'), CASES)
def test_a_weight_is_multiplied_by_the_kernel_where_it_fits(equation, x, codes, scale):
    x, weight = arrays(x, codes, scale)
    summed = (0, 1) if equation.startswith('btnh') else (0,)
    found = few_rows(x, weight.qvalue, weight.scale, summed, 2, interpret=True)
    is_right(equation, x, weight, found)
    by_group = QuantizedArray(weight.qvalue, jnp.ones((2, *weight.scale.shape[1:])))
    assert few_rows(x, by_group.qvalue, by_group.scale, summed, 2) is None
    assert few_rows(x, weight.qvalue.T, weight.scale.T, (len(codes) - 1,), 2) is None


@pytest.mark.accelerator
@pytest.mark.filterwarnings('ignore:The Pallas Triton backend')
@pytest.mark.parametrize(('equation', 'x', 'codes', 'scale'), CASES)
def test_on_a_device_it_is_as_right(equation, x, codes, scale):
    x, weight = arrays(x, codes, scale)
    is_right(
        equation,
        x,
        weight,
        jax.jit(lambda x, weight: linear.einsum(equation, x, weight, jnp.float32))(x, weight),
    )
