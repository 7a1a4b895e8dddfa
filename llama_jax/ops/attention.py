"""Grouped-query attention: one front, kernels behind it.

Causal order and packed segments are part of every kernel's contract: a kernel that cannot honour segment ids must be
refused here, never left to be silently wrong.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.types import InputError

IMPLEMENTATIONS = ('auto', 'reference', 'chunked')


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    *,
    q_segment_ids: Int[Array, 'B T'] | None = None,
    kv_segment_ids: Int[Array, 'B S'] | None = None,
    q_start: Int[Array, 'B'] | None = None,
    implementation: str = 'auto',
) -> Float[Array, 'B T N H']:
    """softmax(q k^T / sqrt(H)) v, causal, each query head g reading the key/value head g // (N / K).

    Args:
      q: rotated queries.
      k: rotated keys.
      v: values.
      q_segment_ids: document of each query; a query sees keys of its own document only. None: one document.
      kv_segment_ids: document of each key; given with `q_segment_ids`.
      q_start: slot of row b's first query among the S keys (its tokens already in the cache). None: 0.
      implementation: one of `IMPLEMENTATIONS`; 'auto' takes the best for the platform and shapes.

    Returns:
      The attended values in the dtype of `q`; the softmax itself is fp32.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f'unknown attention implementation {implementation!r}; choose from {IMPLEMENTATIONS}'
        )
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError('q_segment_ids and kv_segment_ids are given together or not at all')
    # With a cache every query may see most keys and there is little to skip.
    chunkable = q_start is None and q.shape[1] == k.shape[1]
    if implementation == 'chunked' and not chunkable:
        raise ValueError('chunked attention needs queries and keys of the same tokens; use auto or reference')
    if implementation == 'chunked' or (implementation == 'auto' and chunkable):
        return chunked_attention(q, k, v, q_segment_ids)
    mask = causal_mask(q.shape[1], k.shape[1], q_start)
    if q_segment_ids is not None and kv_segment_ids is not None:
        mask = mask & (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])
    return reference_attention(q, k, v, mask)


def causal_mask(
    num_queries: int, num_keys: int, q_start: Int[Array, 'B'] | None = None
) -> Bool[Array, '_ T S']:
    """True where a key's slot is not after the query's; the leading axis is B, or 1 where all rows start at 0."""
    start = jnp.zeros((1,), jnp.int32) if q_start is None else q_start
    q_slot = start[:, None] + jnp.arange(num_queries)[None, :]
    return q_slot[:, :, None] >= jnp.arange(num_keys)[None, None, :]


def reference_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    mask: Bool[Array, '_ T S'],
) -> Float[Array, 'B T N H']:
    """Plain attention that holds the scores [B, K, G, T, S] in fp32: exact on any platform, O(T S) memory."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum('btkgh,bskh->bkgts', grouped, k, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    # A finite minimum, not -inf: a padding row may see no key at all and must not become NaN.
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum('bkgts,bskh->btkgh', weights, v).reshape(q.shape)


# At most this many blocks, so that the unrolled program stays small; none shorter than this many queries.
_MAX_BLOCKS, _MIN_BLOCK = 8, 64


def chunked_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    segment_ids: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T N H']:
    """Causal self-attention in blocks of queries, each against only the keys up to its own end.

    Half the work of `reference_attention`. The backward pass recomputes the scores of one block at a time, so memory
    is O(T x block) rather than O(T^2), and nothing of it is kept from the forward pass but q, k and v.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    # Heads before tokens: the products of a block are then plain batched matrix products, without a transposition.
    grouped = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(
        0, 2, 3, 1, 4
    )
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    block = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None]
        if segment_ids is not None:
            mask = mask & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
        outputs.append(_attend_block(grouped[:, :, :, start:end], keys[:, :, :end], values[:, :, :end], mask))
    out = jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape)


@jax.checkpoint
def _attend_block(
    q: Float[Array, 'B K G T H'],
    k: Float[Array, 'B K S H'],
    v: Float[Array, 'B K S H'],
    mask: Bool[Array, '_ T S'],
) -> Float[Array, 'B K G T H']:
    scores = jnp.einsum('bkgth,bksh->bkgts', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    # Every query sees itself, so the maximum is finite. The normaliser divides the output, which is smaller.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    attended = jnp.einsum('bkgts,bksh->bkgth', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (attended / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)
