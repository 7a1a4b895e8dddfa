"""Grouped-query attention: one front, kernels behind it.

Causal order and packed segments are part of every kernel's contract: a kernel that cannot honour segment ids must be
refused here, never left to be silently wrong.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.types import InputError

IMPLEMENTATIONS = ('auto', 'reference')


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
