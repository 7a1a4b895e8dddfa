"""Codes of 4 bits as bitsandbytes has them, bit for bit, and products as of the weight that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import linear
from llama_jax.ops.nf4 import LEVELS, absmax_of, codes_of, dequantize_absmax, quantize_absmax, quantize_nf4
from llama_jax.ops.quantized import scale_shape, spread

# Equation, shape of the weight, axes that are summed over, weights in a block, whether absmax is quantised too.
PRODUCTS = [
    ('btd,dnh->btnh', (128, 6, 8), (0,), 64, True),
    pytest.param('btnh,nhd->btd', (6, 32, 40), (0, 1), 64, True, marks=pytest.mark.slow),
    (
        'btd,df->btf',
        (86, 55),
        (0,),
        43,
        False,
    ),  # blocks of another length, and an odd number of codes in a row
]


def normal(*shape, seed=0):
    return jnp.float32(np.random.default_rng((*shape, seed)).normal(size=shape))


@pytest.mark.parametrize(('equation', 'shape', 'summed', 'block', 'double'), PRODUCTS)
def test_products_and_gradients_are_those_of_the_weight(equation, shape, summed, block, double, monkeypatch):
    weight = normal(*shape)
    ours = quantize_nf4(weight, scale_shape(shape, summed, block), double=double)
    assert isinstance(ours, linear.Representation) and ours.shape == shape and ours.codes.dtype == jnp.uint4
    assert ours.absmax.dtype == (jnp.int8 if double else jnp.float32)
    values = np.float64(ours.materialize())
    largest_gap = float(np.diff(LEVELS).max()) / 2
    absmax = np.abs(weight).max()
    assert np.abs(values - weight).max() <= absmax * (largest_gap + (0.02 if double else 1e-6))
    sizes = dict(zip(equation[equation.index(',') + 1 :], shape, strict=False)) | {'b': 2, 't': 3}
    x = normal(*(sizes[letter] for letter in equation[: equation.index(',')]), seed=1)
    wanted = np.einsum(equation, np.float64(x), values)

    def loss(x, weight):
        return jnp.square(linear.einsum(equation, x, weight)).sum()

    of_values = jax.grad(loss)(x, jnp.float32(values))
    for branch in ('cpu', 'default'):
        monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, **of: of[branch](*args))  # noqa: B023
        product = jax.jit(functools.partial(linear.einsum, equation))(x, ours)
        np.testing.assert_allclose(product, wanted, atol=1e-4)
        found = jax.jit(jax.grad(loss))(x, ours)
        np.testing.assert_allclose(found, of_values, atol=1e-5 * float(jnp.abs(of_values).max()))


def test_a_layers_numbers_do_not_depend_on_the_others():
    weight = normal(3, 128, 6, 8) * jnp.array([1, 10, 0.1]).reshape(3, 1, 1, 1)
    counts = scale_shape(weight.shape, (1,), 64)
    stacked = jax.jit(lambda w: quantize_nf4(w, counts, num_stacked=1))(weight)
    alone = jax.jit(lambda w: quantize_nf4(w, (1, *counts[1:]), num_stacked=1))(weight[1:2])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1:2], b), stacked, alone)
    zero = jax.jit(lambda w: quantize_nf4(w, (2, 4)).materialize())(jnp.zeros((128, 4)))
    np.testing.assert_array_equal(zero, np.zeros((128, 4)))


def test_half_a_byte_a_weight_and_an_eighth_of_one_for_absmax():
    compiled = jax.jit(lambda w: w.materialize()).lower(quantize_nf4(normal(4096, 64), (64, 64))).compile()
    taken = compiled.memory_analysis().argument_size_in_bytes / (4096 * 64)
    assert 0.5 + 1 / 64 <= taken < 0.5176


def test_codes_and_values_are_those_of_bitsandbytes():
    functional = pytest.importorskip('bitsandbytes.functional')
    torch = pytest.importorskip('torch')
    matrix = np.random.default_rng(0).normal(size=(96, 256)).astype(np.float32)  # [out, in], as torch's
    matrix[3, 64:128] = 0
    matrix[5, :16] = LEVELS  # of a block whose largest is 1: what lies just at a level
    matrix[5, 16:64] = np.resize((LEVELS[:-1] + LEVELS[1:]) / 2, 48)  # and half way between two
    packed, state = functional.quantize_4bit(torch.from_numpy(matrix), blocksize=64, quant_type='nf4')
    packed = packed.numpy().reshape(-1)
    theirs = np.stack([packed >> 4, packed & 15], -1).reshape(matrix.shape)
    ours = np.ascontiguousarray(matrix.T)
    absmax = absmax_of(ours, (4, 96))
    np.testing.assert_array_equal(codes_of(ours, spread(absmax, ours.shape)), theirs.T)
    np.testing.assert_array_equal(absmax.T.reshape(-1), state.absmax.numpy())
    array = jax.jit(lambda w: quantize_nf4(w, (4, 96), double=False))(jnp.asarray(ours))
    np.testing.assert_array_equal(np.asarray(array.codes.astype(jnp.uint8)), theirs.T)
    np.testing.assert_array_equal(array.materialize(), functional.dequantize_4bit(
        torch.from_numpy(packed.reshape(-1, 1)), state).numpy().T)  # fmt: skip
    # Double quantisation, which is ours: what it loses of absmax is no more than what theirs does.
    again = dequantize_absmax(*quantize_absmax(absmax, ours.shape, 0))
    _, double = functional.quantize_4bit(
        torch.from_numpy(matrix), blocksize=64, quant_type='nf4', compress_statistics=True
    )
    nested = functional.dequantize_blockwise(double.absmax, double.state2) + double.offset
    lost_by_theirs = np.abs(nested.numpy() - absmax.T.reshape(-1))
    lost = np.abs(again - absmax)
    assert lost.max() <= lost_by_theirs.max() and np.square(lost).mean() <= np.square(lost_by_theirs).mean()
