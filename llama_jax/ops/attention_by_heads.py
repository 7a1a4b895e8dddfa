"""Causal attention on a CPU, one head after the other, whose queries begin their rows; no gradients.

XLA's CPU multiplies the matrices of several heads on a single core, one large matrix on all of them. So of each head a
block of queries meets all keys up to its last one at once: what lies behind the diagonal's own block is never computed,
and no running softmax is needed. The scores of a single head are in memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Queries that meet keys at a time. Of fewer a head's product is left to a single core too.
_BLOCK = 256
# Of rows longer than this the scores of a block would leave the caches of a core.
_MAX_LENGTH = 1024
_MASKED = float(jnp.finfo(jnp.float32).min)


def serves(length: int) -> bool:
    """Whether rows of so many tokens are read faster so."""
    return _BLOCK < length <= _MAX_LENGTH


def attend_by_heads(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H']
) -> Float[Array, 'B T N H']:
    """Attention of each token to those of its row up to itself, in fp32.

    Args:
      q: rotated queries.
      k: rotated keys.
      v: values.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    queries = (q.astype(jnp.float32) * head_dim**-0.5).transpose(0, 2, 1, 3)
    queries = queries.reshape(batch * num_kv_heads, num_heads // num_kv_heads, length, head_dim)
    keys, values = (
        x.astype(jnp.float32).transpose(0, 2, 1, 3).reshape(batch * num_kv_heads, length, head_dim)
        for x in (k, v)
    )

    def of_group(item: tuple[Array, Array, Array]) -> Float[Array, 'G T H']:
        own, keys, values = item
        return jax.lax.map(lambda head: _attend(head, keys, values), own)

    out = jax.lax.map(of_group, (queries, keys, values))
    return out.reshape(batch, num_heads, length, head_dim).transpose(0, 2, 1, 3).astype(q.dtype)


def _attend(
    queries: Float[Array, 'T H'], keys: Float[Array, 'T H'], values: Float[Array, 'T H']
) -> Float[Array, 'T H']:
    """Of one head; the queries are scaled."""
    attended = []
    for start in range(0, len(queries), _BLOCK):
        end = min(start + _BLOCK, len(queries))
        scores = queries[start:end] @ keys[:end].T
        mask = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        scores = jnp.where(mask, scores, _MASKED)
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        attended.append(weights @ values[:end] / jnp.sum(weights, axis=1, keepdims=True))
    return jnp.concatenate(attended)
