"""Rotary position embedding (Su et al. 2021) with Llama 3.1's frequency scaling.

The rotated pairs are (x[j], x[j + H/2]), the half-split layout. Meta's files and GGUF store the rows of the q and k
weights interleaved, pairs (x[2j], x[2j+1]); converters permute.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def inverse_frequencies(
    head_dim: int,
    theta: float,
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_seq_len: int = 8192,
    kind: str = 'llama3',
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Float[np.ndarray, 'H2']:
    """Radians per position of each of the H/2 pairs, fp32, computed on the host exactly as torch computes them.

    f_j = theta ** (-2j / H). With `factor` > 1 the frequencies are stretched as by `apply_scaling` of Meta's
    llama-models: wavelengths beyond `original_max_seq_len / low_freq_factor` become `factor` times longer, those
    below `original_max_seq_len / high_freq_factor` stay, and between them the two are blended linearly.

    Other kinds as in transformers' modeling_rope_utils.py: 'linear' slows every frequency down by the factor (Chen et
    al. 2023); 'yarn' those that make fewer than `beta_slow` turns in the original context, leaves those of more than
    `beta_fast`, and blends between them (Peng et al. 2023); 'dynamic' none within the original context.

    Released models differ by one ulp from any other rounding order, and at position 130,000 an ulp is an angle of
    1e-2, so the order is part of the contract: fp32 exponent, fp64 power rounded to fp32, fp32 reciprocal.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / power
    if factor == 1.0 or kind == 'dynamic':
        return frequencies
    if kind == 'linear':
        return frequencies / np.float32(factor)
    if kind == 'yarn':

        def pair_of(turns: float) -> float:
            return head_dim * math.log(original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_of(beta_fast), pair_of(beta_slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 * (low == high)
        pairs = np.arange(head_dim // 2, dtype=np.float32)
        ramp = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
        kept = np.float32(1.0) - ramp
        slowed = np.float32(1.0) / (np.float32(factor) * power)
        return (slowed * (np.float32(1.0) - kept) + frequencies * kept).astype(np.float32)
    wavelengths = np.float32(2 * math.pi) / frequencies
    slowed = frequencies / np.float32(factor)
    # 0 where the wavelength is too long to have been seen whole in training, 1 where it is short.
    ramp = (np.float32(original_max_seq_len) / wavelengths - np.float32(low_freq_factor)) / np.float32(
        high_freq_factor - low_freq_factor
    )
    blended = (np.float32(1.0) - ramp) * slowed + ramp * frequencies
    long = wavelengths > original_max_seq_len / low_freq_factor
    short = wavelengths < original_max_seq_len / high_freq_factor
    return np.where(short, frequencies, np.where(long, slowed, blended)).astype(np.float32)


def rope_tables(
    positions: Int[Array, 'B T'], frequencies: Float[np.ndarray, 'H2'], scale: float = 1.0
) -> tuple[Float[Array, 'B T H2'], Float[Array, 'B T H2']]:
    """Cosine and sine of every position's angles, fp32 like Meta's table; times `scale`, yarn's factor of attention."""
    angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if scale == 1.0 else (cos * np.float32(scale), sin * np.float32(scale))


def kept_tables(
    cos: Float[Array, 'B T H2'], sin: Float[Array, 'B T H2']
) -> tuple[Float[Array, 'B T H2'], Float[Array, 'B T H2']]:
    """The same, in memory: where layers stand one by one, XLA's CPU takes them anew for each head of each of them."""

    def alike(cos: Array, sin: Array) -> tuple[Array, Array]:
        return jnp.where(jnp.isnan(cos), jnp.nan, cos), jnp.where(jnp.isnan(sin), jnp.nan, sin)

    # What a branch is given is in memory. Either gives the same; of two that are written alike XLA would make none.
    return jax.lax.cond(jnp.isnan(cos[0, 0, 0]), alike, lambda cos, sin: (cos, sin), cos, sin)


def apply_rope(
    x: Float[Array, 'B T N H'], cos: Float[Array, 'B T H2'], sin: Float[Array, 'B T H2']
) -> Float[Array, 'B T N H']:
    """Rotates every head of `x` by its position's angles, in fp32, and casts back."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
