"""Causal self-attention of rows that hold contexts and several continuations of each, all in segments of their own.

In plain JAX for any platform. An implementation of its own, asked for by name (`inference.scoring` does), because to
all others a segment sees nothing but itself.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The segment of the first context of a row; the next has one less. Its continuations are of the segments from 1 on,
# those of the next from 1 + _MOST on.
SHARED = -1
_MOST = 1 << 15

# At most this many blocks of queries, so that the program stays small; none shorter than this many.
_MAX_BLOCKS, _MIN_BLOCK = 8, 64


def segment_of(context: int, continuation: int) -> int:
    """The segment of a continuation, counted from 1, of a context, counted from 0."""
    assert 0 < continuation < _MOST, 'so many continuations fit no row'
    return context * _MOST + continuation


def shared_prefix_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    segment_ids: Int[Array, 'B T'],
) -> Float[Array, 'B T N H']:
    """Each query sees the keys up to its own of its segment and of its context; one block of queries at a time."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    # Heads before tokens: the products of a block are then plain batched matrix products, without a transposition.
    context_ids = SHARED - segment_ids // _MOST
    queries, keys, values = grouped.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    block = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        segment = segment_ids[:, None, :end]
        visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        of_context = (context_ids[:, start:end, None] == segment) & (segment < 0)
        visible = visible[None] & ((segment_ids[:, start:end, None] == segment) | of_context)
        scores = jnp.einsum(
            'bkgth,bksh->bkgts', queries[:, :, :, start:end], keys[:, :, :end],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
        # Every query sees itself, so the maximum is finite. The normaliser divides the output, which is smaller.
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        attended = jnp.einsum(
            'bkgts,bksh->bkgth', weights.astype(v.dtype), values[:, :, :end],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        outputs.append((attended / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype))
    return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(q.shape)
