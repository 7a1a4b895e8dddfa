"""Causal attention tile by tile with a running softmax, in plain JAX: any platform, any length, memory O(T).

FlashAttention-2's algorithm (Dao 2023, algorithms 1 and 2): a block of queries meets one block of keys after another;
kept from the forward pass are the output and each query's log-normaliser, from which the backward pass makes the
weights of a tile again.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.ops.attention_shared_prefix import unit_of, visible

_MASKED = float(jnp.finfo(jnp.float32).min)  # finite: what sees no key must not become NaN


def chunked_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    q_segment_ids: Int[Array, 'B T'] | None = None,
    kv_segment_ids: Int[Array, 'B S'] | None = None,
    chunk_starts: Int[Array, 'C'] | None = None,
    max_block: int = 512,
    *,
    sees_context: bool = False,
) -> Float[Array, 'B T N H']:
    """Attention of queries that lie in C chunks of T / C successive slots each, to all keys up to each one's slot.

    Args:
      q: rotated queries.
      k: rotated keys, slot after slot.
      v: values.
      q_segment_ids: document of each query; a query sees keys of its own document only.
      kv_segment_ids: document of each key.
      chunk_starts: slot of each chunk's first query among the keys. None: one chunk from slot 0.
      max_block: most queries and keys in a tile; fewer where a chunk is short, as only whole tiles are skipped.
      sees_context: whether the segments are those of `ops.attention_shared_prefix`, which see their context too.

    Returns:
      The attended values, named 'attention_output' for remat policies, as is the log-normaliser.
    """
    batch, length, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    starts = jnp.zeros((1,), jnp.int32) if chunk_starts is None else chunk_starts
    chunk = length // starts.shape[0]
    block = min(max_block, chunk if chunk <= 128 else 64 * math.ceil(chunk / 256))
    # Queries are padded chunk by chunk, keys at the end, where no query but a padding one sees them.
    padded_chunk, padded_keys = (block * math.ceil(size / block) for size in (chunk, num_keys))
    block_starts = (starts[:, None] + jnp.arange(0, padded_chunk, block, dtype=jnp.int32)[None, :]).reshape(
        -1
    )

    def query_blocks(x: Array, mode: str) -> Array:
        """[B, T, ...] -> [blocks, B, block, ...]."""
        x = x.reshape(batch, starts.shape[0], chunk, *x.shape[2:])
        x = _pad(x, 2, padded_chunk, mode)
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[3:]), 1, 0)

    queries = query_blocks(q, 'constant').reshape(
        -1, batch, block, num_kv_heads, num_heads // num_kv_heads, head_dim
    )
    queries = queries.transpose(0, 1, 3, 4, 2, 5)
    keys, values = (_pad(x.transpose(0, 2, 1, 3), 2, padded_keys, 'constant') for x in (k, v))
    segments = None
    if q_segment_ids is not None and kv_segment_ids is not None:
        segments = query_blocks(q_segment_ids, 'edge'), _pad(kv_segment_ids, 1, padded_keys, 'edge')
    out: Any = _chunked(queries, keys, values, segments, block_starts, sees_context)
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, starts.shape[0], padded_chunk, num_heads, head_dim)
    return out[:, :, :chunk].reshape(q.shape)


def _pad(x: Array, axis: int, size: int, mode: str) -> Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)], mode=mode)  # pyright: ignore[reportArgumentType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked(q, k, v, segments, starts, sees_context):
    """Q [M, B, K, G, block, H], k and v [B, K, S, H] -> [M, B, K, G, block, H]."""
    return _forward(q, k, v, segments, starts, sees_context)[0]


def _forward(q, k, v, segments, starts, sees_context):
    def attend(item):
        q_block, q_segments, start = item
        low, high = _key_blocks(q_segments, segments, start, q_block.shape[-2], k.shape[2], sees_context)

        def visit(index, carry):
            attended, largest, total = carry
            scores, _, v_block = _tile(q_block, q_segments, start, k, v, segments, index, sees_context)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            # Where all seen so far is masked this is 1 rather than 0; `shrink` wipes it out with the first visible key.
            weights = jnp.exp(scores - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            product = jnp.einsum(
                'bkgts,bksh->bkgth', weights.astype(v.dtype), v_block, preferred_element_type=jnp.float32
            )
            return (
                attended * shrink[..., None] + product,
                new_largest,
                total * shrink + jnp.sum(weights, axis=-1),
            )

        rows = q_block.shape[:-1]
        start_values = (
            jnp.zeros(q_block.shape, jnp.float32),
            jnp.full(rows, _MASKED),
            jnp.zeros(rows, jnp.float32),
        )
        attended, largest, total = jax.lax.fori_loop(low, high, visit, start_values)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (attended / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    q_segments = None if segments is None else segments[0]
    out, log_normalizer = jax.lax.map(attend, (q, q_segments, starts))
    out = checkpoint_name(out, 'attention_output')
    log_normalizer = checkpoint_name(log_normalizer, 'attention_output')
    return out, (q, k, v, segments, starts, out, log_normalizer)


def _backward(sees_context, residuals, gradient):
    q, k, v, segments, starts, out, log_normalizer = residuals
    scale = q.shape[-1] ** -0.5

    def attend(carry, item):
        q_block, q_segments, start, out_block, out_gradient, normalizer = item
        # sum_s weights * d weights, which the softmax's derivative subtracts
        mean = jnp.sum(out_gradient.astype(jnp.float32) * out_block.astype(jnp.float32), axis=-1)
        block = q_block.shape[-2]
        low, high = _key_blocks(q_segments, segments, start, block, k.shape[2], sees_context)

        def visit(index, carry):
            q_gradient, k_gradient, v_gradient = carry
            scores, k_block, v_block = _tile(q_block, q_segments, start, k, v, segments, index, sees_context)
            weights = jnp.exp(scores - normalizer[..., None])
            by_weights = jnp.einsum(
                'bkgth,bksh->bkgts', out_gradient, v_block, preferred_element_type=jnp.float32
            )
            by_scores = (weights * (by_weights - mean[..., None]) * scale).astype(q.dtype)
            q_gradient += jnp.einsum(
                'bkgts,bksh->bkgth', by_scores, k_block, preferred_element_type=jnp.float32
            )
            by_k = jnp.einsum('bkgts,bkgth->bksh', by_scores, q_block, preferred_element_type=jnp.float32)
            by_v = jnp.einsum(
                'bkgts,bkgth->bksh', weights.astype(v.dtype), out_gradient, preferred_element_type=jnp.float32
            )
            return q_gradient, _add_block(k_gradient, by_k, index), _add_block(v_gradient, by_v, index)

        q_gradient, *carry = jax.lax.fori_loop(
            low, high, visit, (jnp.zeros(q_block.shape, jnp.float32), *carry)
        )
        return tuple(carry), q_gradient.astype(q.dtype)

    q_segments = None if segments is None else segments[0]
    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (k_gradient, v_gradient), q_gradient = jax.lax.scan(
        attend, zeros, (q, q_segments, starts, out, gradient, log_normalizer)
    )
    return q_gradient, k_gradient.astype(k.dtype), v_gradient.astype(v.dtype), None, None


_chunked.defvjp(_forward, _backward)


def _tile(q, q_segments, start, k, v, segments, index, sees_context):
    """Masked scores [B, K, G, block, block] of a block of queries with key block `index`, and its keys and values."""
    block = q.shape[-2]
    k_block, v_block = (jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=2) for x in (k, v))
    scores = (
        jnp.einsum('bkgth,bksh->bkgts', q, k_block, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    )
    slots = jnp.arange(block, dtype=jnp.int32)
    mask = ((start + slots)[:, None] >= (index * block + slots)[None, :])[None]
    if segments is not None:
        kv_segments = jax.lax.dynamic_slice_in_dim(segments[1], index * block, block, axis=1)
        if sees_context:
            mask = mask & visible(q_segments, kv_segments)
        else:
            mask = mask & (q_segments[:, :, None] == kv_segments[:, None, :])
    return jnp.where(mask[:, None, None], scores, _MASKED), k_block, v_block


def _key_blocks(q_segments, segments, start, block, num_keys, sees_context):
    """The first key block that any query of the block may see, and the one after the last."""
    high = jnp.minimum((start + 2 * block - 1) // block, num_keys // block)
    if segments is None:
        return jnp.int32(0), high

    def documents(ids):
        """One number for what may meet, which rises along a row: what pads it, of segment 0, comes last."""
        return jnp.where(ids == 0, jnp.iinfo(jnp.int32).max, unit_of(ids) if sees_context else ids)

    # Documents come one after another, so the blocks before the first that shares one with the queries share none.
    queries, keys = documents(q_segments), documents(segments[1]).reshape(q_segments.shape[0], -1, block)
    may_meet = (jnp.min(keys, -1) <= jnp.max(queries, -1)[:, None]) & (
        jnp.min(queries, -1)[:, None] <= jnp.max(keys, -1)
    )
    return jnp.argmax(jnp.any(may_meet, axis=0)).astype(jnp.int32), high


def _add_block(total, part, index):
    """`total` with `part` added to its key block `index`, in place."""
    block = part.shape[2]
    before = jax.lax.dynamic_slice_in_dim(total, index * block, block, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, before + part, index * block, axis=2)
