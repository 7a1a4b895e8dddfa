"""Attention as its formula says it: all scores at once, on any platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def causal_mask(num_queries: int, num_keys: int) -> Bool[Array, '1 T S']:
    """True where a key's slot is not after the query's."""
    return (jnp.arange(num_queries)[:, None] >= jnp.arange(num_keys)[None, :])[None]


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
