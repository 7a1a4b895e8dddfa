"""cuDNN's flash attention through JAX's public binding, on NVIDIA GPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The binding has no segment ids, but honours a mask, which it hands to the kernel as 2 T^2 bytes a row. Rows of a few
# thousand tokens can afford that; more than this is refused.
_MAX_MASK_BYTES = 1 << 30


def unsupported(
    q: Array | jax.ShapeDtypeStruct, k: Array | jax.ShapeDtypeStruct, packed: bool, local_batch: int
) -> str | None:
    """Why cuDNN cannot attend with these, or None where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f'it computes in bfloat16 or float16, not {q.dtype}'
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f'head_dim {q.shape[-1]} is not a multiple of 8 up to 128'
    if packed:
        if q.shape[1] % 2:
            return f'with segment ids it needs an even number of tokens, not {q.shape[1]}'
        num_bytes = 2 * local_batch * q.shape[1] * k.shape[1]
        if num_bytes > _MAX_MASK_BYTES:
            return (
                f'it honours segment ids only as a mask of {num_bytes / 2**30:.1f} GiB a device, over the limit of '
                f'{_MAX_MASK_BYTES / 2**30:.0f}'
            )
    return None


def cudnn_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    segment_ids: Int[Array, 'B T'] | None = None,
    implementation: str = 'cudnn',
) -> Float[Array, 'B T N H']:
    """Causal self-attention; segments become a mask [B, 1, T, T], which the kernel adds to the scores of every head."""
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    kernel: Any = implementation
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=kernel)
