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
    return weighted_values(attention_probabilities(q, k, mask), v)


def attention_probabilities(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H'], mask: Bool[Array, '_ T S']
) -> Float[Array, 'B N T S']:
    """How much each head of a query looks at each key, in fp32; over the keys they sum to 1."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum('btkgh,bskh->bkgts', grouped, k, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    # A finite minimum, not -inf: a padding row may see no key at all and must not become NaN.
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1).reshape(batch, num_heads, num_queries, k.shape[1])


def weighted_values(
    probabilities: Float[Array, 'B N T S'], v: Float[Array, 'B S K H']
) -> Float[Array, 'B T N H']:
    """What each head reads by these probabilities, in the dtype of `v`."""
    batch, num_heads, num_queries, num_keys = probabilities.shape
    num_kv_heads, head_dim = v.shape[2:]
    shape = batch, num_kv_heads, num_heads // num_kv_heads, num_queries, num_keys
    weights = probabilities.astype(v.dtype).reshape(shape)
    attended = jnp.einsum('bkgts,bskh->btkgh', weights, v)
    return attended.reshape(batch, num_queries, num_heads, head_dim)
