"""A matrix that lies by its outputs: the same products, and the same matrix again."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import linear
from llama_jax.ops.output_major import OutputMajorArray
from llama_jax.ops.quantized import quantize_array


@pytest.mark.parametrize(
    ('equation', 'of_x', 'of_weight', 'num_summed'),
    [
        ('btd,df->btf', (2, 3, 8), (8, 12), 1),
        ('btd,dnh->btnh', (2, 1, 8), (8, 3, 4), 1),
        ('btgh,ghd->btd', (1, 5, 3, 4), (3, 4, 8), 2),
    ],
)
def test_products_are_those_of_the_matrix(equation, of_x, of_weight, num_summed):
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in (of_x, of_weight))
    by_outputs = OutputMajorArray.create(jnp.asarray(weight), num_summed)
    assert isinstance(by_outputs, linear.Representation) and by_outputs.shape == weight.shape
    wanted = np.einsum(equation, x.astype(np.float64), weight.astype(np.float64))
    np.testing.assert_allclose(linear.einsum(equation, jnp.asarray(x), by_outputs), wanted, atol=1e-5)
    np.testing.assert_array_equal(by_outputs.materialize(), weight)
    rounded = linear.einsum(equation, jnp.asarray(x, jnp.bfloat16), by_outputs, jnp.float32)
    assert rounded.dtype == jnp.float32  # activations and products of bfloat16, sums of float32
    np.testing.assert_allclose(rounded, wanted, atol=0.1)


@pytest.mark.parametrize('num_rows', [1, 3, 12])
@pytest.mark.parametrize(
    ('equation', 'of_weight', 'num_summed', 'group'),
    [
        ('btd,df->btf', (64, 12), 1, 0),
        ('btd,df->btf', (64, 12), 1, 32),
        ('btgh,ghd->btd', (4, 16, 9), 2, 0),
        ('btgh,ghd->btd', (4, 16, 9), 2, 32),
    ],
)
def test_integers_lie_so_with_their_scales(equation, of_weight, num_summed, group, num_rows):
    """Of few rows one by one, of many tile by tile."""
    rng = np.random.default_rng(0)
    x, weight = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((1, num_rows, *of_weight[:num_summed]), of_weight)
    )
    codes = quantize_array(weight, 'int8', tuple(range(num_summed)), group)
    by_outputs = OutputMajorArray.create(codes, num_summed)
    assert by_outputs.shape == codes.shape
    np.testing.assert_array_equal(by_outputs.materialize(), codes.materialize())
    wanted = np.einsum(equation, np.float64(x), np.float64(codes.materialize()))
    np.testing.assert_allclose(linear.einsum(equation, x, by_outputs), wanted, atol=1e-5)
