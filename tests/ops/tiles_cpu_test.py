"""Products on a CPU with weights of narrower types: no float32 of a weight is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import tiles_cpu
from llama_jax.ops.linear import einsum


@pytest.mark.parametrize('num_rows', [1, 5])
def test_few_rows_convert_what_they_read_within_their_products(num_rows, monkeypatch):
    """All outputs at once, and in pieces with a rest: the same bits, and as those of a row alone."""
    rng = np.random.default_rng(0)
    x, codes = (
        rng.standard_normal((num_rows, 300)).astype(np.float32), rng.integers(-127, 128, (700, 300), np.int8)
    )  # fmt: skip

    def product(x):
        return tiles_cpu.few_rows_product(x, [jnp.asarray(codes)], lambda codes: codes.astype(jnp.float32))

    wanted = x.astype(np.float64) @ codes.T.astype(np.float64)
    whole = jax.jit(product)(x)
    np.testing.assert_allclose(whole, wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_array_equal(jax.jit(product)(x[:1]), whole[:1])
    monkeypatch.setattr(tiles_cpu, '_SHARED_BYTES', 0)
    monkeypatch.setattr(tiles_cpu, '_PIECE_BYTES', 300 * 256)
    np.testing.assert_array_equal(jax.jit(lambda x: product(x))(x), whole)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='of the compiler for CPUs')
@pytest.mark.parametrize('num_rows', [1, 8])
def test_a_matrix_by_its_outputs_takes_no_memory_beside_it(num_rows):
    x, weight = jnp.ones((num_rows, 1024)), jnp.ones((2048, 1024), jnp.bfloat16)
    compiled = jax.jit(lambda x, w: einsum('bd,fd->bf', x, w)).lower(x, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weight.nbytes // 16  # the rows' sums


def test_a_single_row_with_a_tall_matrix_is_summed_in_parts():
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 1, 4, 16), (4, 16, 24)))
    found = einsum('btgh,ghd->btd', jnp.asarray(x), jnp.asarray(weight))
    wanted = np.einsum('btgh,ghd->btd', *(np.float64(a) for a in (x, weight)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # fp32 sums of 64 products of size 1
    assert found.shape == wanted.shape
