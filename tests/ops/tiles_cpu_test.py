"""Products on a CPU with weights of narrower types: no float32 of a weight is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import tiles_cpu
from llama_jax.ops.linear import einsum
from llama_jax.ops.output_major import OutputMajorArray


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


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='of the compiler for CPUs')
@pytest.mark.parametrize(('num_rows', 'is_left'), [(1, False), (2, True), (64, True), (65, False)])
def test_of_some_rows_the_matrix_stands_left(num_rows, is_left):
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, num_rows, 96), (160, 96)))
    program = jax.jit(lambda x, w: einsum('btd,vd->btv', x, w)).lower(x, weight).compile()
    wanted = np.einsum('btd,vd->btv', *(np.float64(a) for a in (x, weight)))
    np.testing.assert_allclose(program(x, weight), wanted, atol=1e-4)  # sums of 96 products of size 1
    assert (f'f32[160,{num_rows}]' in program.as_text()) == is_left


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='of the compiler for CPUs')
@pytest.mark.parametrize('num_rows', [12, 80])
def test_many_rows_meet_a_weight_of_16_bits_by_its_outputs_tile_by_tile(num_rows, monkeypatch):
    """In a loop of steps too, before which nothing is converted; of tiles with a rest, and of a single one."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((num_rows, 320)).astype(np.float32), rng.standard_normal((320, 700))
    by_outputs = OutputMajorArray.create(jnp.asarray(weight, jnp.bfloat16), 1)
    wanted = np.float64(x) @ np.asarray(by_outputs.materialize(), np.float64)
    zeros = jnp.zeros((num_rows, 700))

    def steps(x, weight):
        return jax.lax.fori_loop(0, 3, lambda _, y: einsum('bd,df->bf', x + 0 * y[:, :320], weight), zeros)

    for tile_bytes in 4 * 320 * 256, tiles_cpu._TILE_BYTES:
        monkeypatch.setattr(tiles_cpu, '_TILE_BYTES', tile_bytes)
        program = jax.jit(lambda *args: steps(*args)).lower(x, by_outputs).compile()
        np.testing.assert_allclose(program(x, by_outputs), wanted, atol=1e-5 * np.abs(wanted).max())
        assert 'while' in program.as_text()
        before = program.as_text().split('ENTRY')[1]
        assert 'f32[700,320]' not in before and 'f32[320,700]' not in before
