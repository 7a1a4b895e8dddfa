"""A matrix that lies by its outputs: the same products, and the same matrix again."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import linear
from llama_jax.ops.output_major import OutputMajorArray


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
