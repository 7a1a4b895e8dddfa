"""Integers with scales in a weight's place: codes as qwix's, products as of the weight that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import linear, quantized
from llama_jax.ops.quantized import quantize_array, scale_shape

# Equation, shape of the weight, axes that are summed over: all that the model has.
PRODUCTS = [
    ('btd,dnh->btnh', (96, 6, 8), (0,)),
    ('btnh,nhd->btd', (6, 16, 40), (0, 1)),
    ('btd,df->btf', (96, 56), (0,)),
    ('bd,vd->bv', (56, 96), (1,)),
]
FORMS = [('int8', 0), ('int8', 32), ('int4', 0), ('int4', 32)]


def normal(*shape, seed=0):
    return np.random.default_rng((*shape, seed)).normal(size=shape).astype(np.float32)


def checked_values(ours, weight, dtype, summed, group):
    """The weight that codes and scales stand for, which are looked at one group of numbers after the other."""
    most = {'int8': 127, 'int4': 7}[dtype]
    outputs = [axis for axis in range(weight.ndim) if axis not in summed]
    codes = np.asarray(ours.qvalue).astype(np.float32)
    rows, codes, scales = (x.transpose(*outputs, *summed) for x in (weight, codes, np.float32(ours.scale)))
    shape, length = rows.shape, np.prod([weight.shape[axis] for axis in summed])
    rows, codes = (x.reshape(-1, group or length) for x in (rows, codes))
    for row, code, scale in zip(rows, codes, scales.reshape(-1), strict=True):
        shares = np.array([1, 0.9, 0.8] if dtype == 'int4' else [1])
        candidates = np.abs(row).max() / (most + 0.5) * shares + (not row.any())
        errors = [np.square((row / c).round().clip(-most - 1, most) * c - row).sum() for c in candidates]
        expected = candidates[np.abs(candidates / scale - 1).argmin()]
        # A unit or two in the last place of float32, and of groups half a one of float16
        np.testing.assert_allclose(scale, expected, rtol=2**-11 if group else 3e-7)
        # Of the largest weight either code is as near as the other
        assert errors[list(candidates).index(expected)] <= min(errors) * 1.0001
        # The nearest code. Of the largest, half way between two by construction, either: XLA multiplies by inverses
        exact = (row / np.float64(expected)).clip(-most - 1, most)
        np.testing.assert_allclose(code, exact, rtol=0, atol=0.5 + 1e-5 * most)
    values = (codes * scales.reshape(-1, 1)).reshape(shape)
    return values.transpose(np.argsort([*outputs, *summed]))


@pytest.mark.parametrize(
    ('product', 'form'),
    [*((p, f) for p in PRODUCTS for f in FORMS[::3]), *zip(PRODUCTS[1:3], FORMS[1:3], strict=True)],
)
def test_codes_scales_products_and_rows(product, form, monkeypatch):
    (equation, shape, summed), (dtype, group) = product, form
    monkeypatch.setattr(
        quantized, '_TILE_BYTES', 4 * 24 * shape[-1]
    )  # several, and a shorter one behind them
    weight = normal(*shape)
    weight.flat[: weight.shape[-1]] = 0  # a row of zeros: groups of them, in some of the shapes
    ours = jax.jit(quantize_array, static_argnums=(1, 2, 3))(weight, dtype, summed, group)
    assert (ours.qvalue.dtype, ours.scale.dtype) == (dtype, np.float16 if group else np.float32)
    values = checked_values(ours, weight, dtype, summed, group)
    sizes = dict(zip(equation[equation.index(',') + 1 :], shape, strict=False)) | {'b': 2, 't': 3}
    x = normal(*(sizes[letter] for letter in equation[: equation.index(',')]), seed=1)
    rounded = jnp.asarray(x, jnp.bfloat16)
    expected, of_rounded = (np.einsum(equation, np.float64(a), np.float64(values)) for a in (x, rounded))
    rows, is_table = np.array([[0, 5], [1, 0]]), summed == (1,)
    for branch in ('cpu', 'default'):
        monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, **of: of[branch](*args))  # noqa: B023

        def all_of_it(x, rounded, rows, ours):
            table = ours if is_table else quantize_array(jnp.ones((6, 4)), 'int8', (1,))
            products = [linear.einsum(equation, *args) for args in ((x, ours), (rounded, ours, jnp.float32))]
            return *products, linear.take(table, rows, jnp.float32), ours.materialize()

        y, y_of_rounded, taken, whole = jax.jit(all_of_it)(x, rounded, rows, ours)
        assert y_of_rounded.dtype == jnp.float32
        # fp32 sums of 96 products of size 1, largest 40: a code or a scale out of place is off by 0.1 at least
        np.testing.assert_allclose(y, expected, atol=1e-4)
        # Where weights are rounded to bf16 in front of a product, by 2^-9: they are at most 4, of 96 a sum
        is_exact = branch == 'cpu' or not group
        np.testing.assert_allclose(y_of_rounded, of_rounded, atol=1e-4 if is_exact else 0.2)
        np.testing.assert_array_equal(whole, values)
        if is_table:
            np.testing.assert_array_equal(taken, values[rows])


@pytest.mark.parametrize(('dtype', 'group'), FORMS)
def test_codes_and_scales_are_those_of_qwix(dtype, group):
    qwix = pytest.importorskip('qwix')

    def both(weights):
        for weight, (_, shape, summed) in zip(weights, PRODUCTS, strict=True):
            ours = quantize_array(weight, dtype, summed, group)
            tiles = {a: shape[a] // n for a, n in enumerate(ours.scale.shape) if n not in (1, shape[a])}
            each = [a for a, n in enumerate(ours.scale.shape) if n == shape[a]]
            theirs = [
                qwix.quantize(
                    weight, jnp.dtype(dtype), channelwise_axes=each, tiled_axes=tiles,
                    calibration_method=f'absmax,{share}', scale_dtype=ours.scale.dtype,
                )
                for share in quantized.SHARES[dtype]
            ]  # fmt: skip
            whole = qwix.dequantize(qwix.QArray(ours.qvalue, ours.scale.astype(jnp.float32)))
            yield ours, [(t.qvalue, t.scale) for t in theirs], (ours.materialize(), whole)

    for ours, theirs, pair in jax.jit(lambda w: list(both(w)))([normal(*shape) for _, shape, _ in PRODUCTS]):
        np.testing.assert_array_equal(*pair)
        chosen = np.zeros(ours.shape, bool)
        for codes, scale in theirs:  # each group is theirs of one of the shares
            same = quantized.spread(np.asarray(scale == ours.scale), ours.shape)
            np.testing.assert_array_equal(np.asarray(ours.qvalue)[same], np.asarray(codes)[same])
            chosen |= same
        assert chosen.all()


@pytest.mark.parametrize(('product', 'form'), [(PRODUCTS[0], FORMS[0]), (PRODUCTS[1], FORMS[3])])
def test_what_is_multiplied_has_the_gradient_of_the_weight_that_the_integers_stand_for(product, form):
    (equation, shape, summed), (dtype, group) = product, form
    ours = quantize_array(jnp.asarray(normal(*shape)), dtype, summed, group)
    sizes = dict(zip(equation[equation.index(',') + 1 :], shape, strict=False)) | {'b': 2, 't': 3}
    x = jnp.asarray(normal(*(sizes[letter] for letter in equation[: equation.index(',')]), seed=1))

    def loss(x, weight):
        return jnp.square(linear.einsum(equation, x, weight)).sum()

    found, wanted = (jax.jit(jax.grad(loss))(x, weight) for weight in (ours, ours.materialize()))
    # fp32 sums of some 1,000 products of size 100
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_groups_are_whole_and_lie_along_all_that_is_summed_over():
    assert scale_shape((3, 96, 6, 8), (1,), 32) == (3, 3, 6, 8)
    assert scale_shape((12, 64, 768), (0, 1), 32) == (12, 2, 768)
    assert scale_shape((12, 8, 768), (0, 1), 32) == (3, 1, 768)
    assert scale_shape((12, 8, 768), (0, 1), 0) == (1, 1, 768)
    for shape, summed, group in [((172, 64), (0,), 32), ((96, 4), (0,), 64), ((6, 24, 4), (0, 1), 32)]:
        assert scale_shape(shape, summed, group) is None
    assert scale_shape((6, 8, 4), (0, 1), 64) is None  # more than there are


def test_half_a_byte_and_a_byte_in_memory():
    for dtype, num_bytes in (('int4', 1 << 15), ('int8', 1 << 16)):
        codes = jnp.ones((256, 256), dtype)
        compiled = jax.jit(lambda x: x.astype(jnp.float32)).lower(codes).compile()
        assert compiled.memory_analysis().argument_size_in_bytes == num_bytes


@pytest.mark.parametrize(('dtype', 'group'), [('int8', 0), ('int4', 32)])
def test_a_cpu_makes_a_tile_of_float32_and_accelerators_convert_within_the_product(dtype, group):
    weight, x = jnp.ones((2048, 2048)), jax.ShapeDtypeStruct((1, 1, 2048), jnp.float32)
    ours = jax.eval_shape(lambda: quantize_array(weight, dtype, (0,), group))
    traced = jax.jit(functools.partial(linear.einsum, 'btd,df->btf')).trace(x, ours)
    temporary = traced.lower().compile().memory_analysis().temp_size_in_bytes
    # The tile, and of int4 the bytes; the weight would be 16 MiB in float32
    assert temporary < (3 << 20) + (0 if dtype == 'int8' else 2048 * 1024)
    for platform in ('tpu', 'cuda'):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert 'while' not in text and text.count('dot_general') == 1
