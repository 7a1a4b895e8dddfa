"""RoPE: frequencies against torch and the published scaling, rotation against complex numbers in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import rope
from tests.reference import numpy_llama

# head_dim, factor -> the first index and the ratios unscaled / scaled of the blended band (theta 500,000).
BLENDED_BANDS = {
    (128, 8.0): (29, [1.207484, 1.553415, 2.026313, 2.694530, 3.684253, 5.257327]),
    (128, 32.0): (29, [1.234937, 1.651329, 2.276660, 3.292262, 5.171596, 9.666729]),
    (64, 32.0): (15, [1.651329, 3.292262, 9.666729]),
}


@pytest.mark.parametrize(('head_dim', 'factor'), BLENDED_BANDS)
def test_scaling_of_llama_3_1(head_dim, factor):
    start, band = BLENDED_BANDS[head_dim, factor]
    plain = rope.inverse_frequencies(head_dim, 500_000.0)

    ratios = plain / rope.inverse_frequencies(head_dim, 500_000.0, factor)

    assert (ratios[:start] == 1).all()
    np.testing.assert_allclose(ratios[start : start + len(band)], band, rtol=1e-6)  # the table has 7 digits
    assert (ratios[start + len(band) :] == factor).all()


@pytest.mark.parametrize('theta', [1e4, 5e5, 1e6])
@pytest.mark.parametrize('head_dim', [48, 64, 128])  # 48, of the small presets, has inexact exponents
def test_frequencies_equal_torch(head_dim, theta):
    torch = pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    exponents = torch.arange(0, head_dim, 2).float() / head_dim

    frequencies = rope.inverse_frequencies(head_dim, theta)

    one_by_one = [(1.0 / theta**exponent).item() for exponent in exponents]
    assert frequencies.tolist() == one_by_one
    # torch's vector kernel rounds a few powers to the other side (one entry of these nine tables on AVX-512).
    np.testing.assert_array_max_ulp(frequencies, (1.0 / theta**exponents).numpy(), maxulp=1)


@pytest.mark.parametrize(('head_dim', 'factor'), BLENDED_BANDS)
def test_scaled_frequencies_equal_torch(head_dim, factor):
    torch = pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    scaled = []
    for frequency in torch.from_numpy(rope.inverse_frequencies(head_dim, 500_000.0)):
        wavelength = 2 * math.pi / frequency
        smooth = ((8192 / wavelength - 1) / (4 - 1)).clamp(0, 1)
        scaled.append((1 - smooth) * frequency / factor + smooth * frequency)

    frequencies = rope.inverse_frequencies(head_dim, 500_000.0, factor)

    assert frequencies.tolist() == torch.stack(scaled).tolist()


def test_tables_are_accurate_at_every_position():
    frequencies = rope.inverse_frequencies(128, 500_000.0, 8.0)
    positions = np.arange(131_072, dtype=np.int32)[None, ::7]

    cos, sin = jax.jit(lambda p: rope.rope_tables(p, frequencies))(positions)

    rotation = numpy_llama.rotations(positions, frequencies)
    # The angles reach 131,071 rad, where a sine without exact range reduction is off by 1e-2.
    np.testing.assert_allclose(cos, rotation.real, atol=3e-7, rtol=0)
    np.testing.assert_allclose(sin, rotation.imag, atol=3e-7, rtol=0)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_rotation_and_its_gradient(dtype, tolerance):
    """Against Meta's complex product on interleaved pairs; a rotation's gradient is the opposite rotation.

    bf16 may only round the result, by half a unit in 2^-7.
    """
    rng = np.random.default_rng(0)
    positions = np.array([[0, 1, 77, 4095], [5, 6, 7, 8]], np.int32)
    x, cotangent = (jnp.asarray(rng.normal(size=(2, 4, 3, 16)), dtype) for _ in range(2))
    frequencies = rope.inverse_frequencies(16, 10_000.0)
    cos, sin = rope.rope_tables(jnp.asarray(positions), frequencies)

    rotated, vjp = jax.vjp(lambda x: rope.apply_rope(x, cos, sin), x)

    rotation = numpy_llama.rotations(positions, frequencies)[:, :, None]
    for actual, argument, factor in [(rotated, x, rotation), (vjp(cotangent)[0], cotangent, rotation.conj())]:
        assert actual.dtype == dtype
        expected = numpy_llama.rotate(numpy_llama.interleaved(np.asarray(argument, np.float64)), factor)
        actual = numpy_llama.interleaved(np.asarray(actual, np.float64))
        np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.broadcast_to(rng.normal(size=16).astype(np.float32), (1, 64, 1, 16)) for _ in range(2))
    cos, sin = rope.rope_tables(jnp.arange(64)[None], rope.inverse_frequencies(16, 10_000.0))

    scores = jnp.einsum('btnh,bsnh->ts', rope.apply_rope(q, cos, sin), rope.apply_rope(k, cos, sin))

    for distance in (0, 1, 20):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)  # 16 products of size 1 in fp32
    assert np.std(scores[-1]) > 0.1
