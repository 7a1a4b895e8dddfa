"""Root-mean-square normalisation (Zhang & Sennrich 2019), in the order of operations of Meta's code."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, '*B D'], weight: Float[Array, 'D'], eps: float) -> Float[Array, '*B D']:
    """Scales `x` to unit mean square over its last axis, then by `weight`.

    The statistics are fp32. The cast back to `x.dtype` comes *before* the product with the weight, as in Meta's
    release: the other order gives other low bits in bf16.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    normalized = (x32 * scale).astype(x.dtype)
    return normalized * jnp.expand_dims(weight.astype(x.dtype), tuple(range(x.ndim - 1)))
