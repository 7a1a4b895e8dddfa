"""Attention of new tokens to those in a cache as well, whose arrays lie heads first; no gradients.

A few queries take the formula at once, which reads every key and value where it lies. Many of them, a piece of a long
prompt, go tile by tile with a running softmax (FlashAttention-2, Dao 2023, algorithm 1): no tile beyond the longest row
is visited, and memory is O(T).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = float(
    jnp.finfo(jnp.float32).min
)  # finite: a padding row may see no key at all and must not become NaN


def attend_at_once(
    q: Float[Array, 'B T N H'],
    keys: Float[Array, 'B K S H'],
    values: Float[Array, 'B K S H'],
    start: Int[Array, 'B'],
) -> Float[Array, 'B T N H']:
    """The formula; it holds the scores [B, K, G, T, S] in fp32.

    Args:
      q: rotated queries; row b's stand at slots start[b], start[b] + 1, ...
      keys: rotated keys, those of the queries too.
      values: as the keys.
      start: tokens that each row had read before.
    """
    grouped = _grouped(q, keys.shape[1])
    scores = _scores(grouped, keys, start, jnp.arange(keys.shape[2]))
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return _ungrouped(_product('bkms,bksh->bkmh', weights, values), q.shape)


def attend_by_tiles(
    q: Float[Array, 'B T N H'],
    keys: Float[Array, 'B K S H'],
    values: Float[Array, 'B K S H'],
    start: Int[Array, 'B'],
    max_block: int,
) -> Float[Array, 'B T N H']:
    """As `attend_at_once`, `max_block` queries with as many keys at a time."""
    length, num_slots = q.shape[1], keys.shape[2]
    block, key_block = min(max_block, length), math.gcd(max_block, num_slots)
    num_blocks = math.ceil(length / block)
    padded = jnp.pad(q, ((0, 0), (0, num_blocks * block - length), (0, 0), (0, 0)))

    def block_of(index):
        queries = jax.lax.dynamic_slice_in_dim(padded, index * block, block, axis=1)
        queries, first = _grouped(queries, keys.shape[1]), start + index * block

        def visit(tile, carry):
            attended, largest, total = carry
            k, v = (
                jax.lax.dynamic_slice_in_dim(x, tile * key_block, key_block, axis=2).astype(q.dtype)
                for x in (keys, values)
            )
            scores = _scores(queries, k, first, tile * key_block + jnp.arange(key_block))
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            # Where all seen so far is masked this is 1 rather than 0; `shrink` wipes it out with the first visible key.
            weights = jnp.exp(scores - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            product = _product('bkms,bksh->bkmh', weights.astype(q.dtype), v, jnp.float32)
            attended = attended * shrink[..., None] + product
            return attended, new_largest, total * shrink + jnp.sum(weights, axis=-1)

        rows = queries.shape[:-1]
        carry = jnp.zeros(queries.shape), jnp.full(rows, _MASKED), jnp.zeros(rows)
        seen = jnp.minimum(jnp.max(first) + block, num_slots)
        attended, _, total = jax.lax.fori_loop(0, (seen + key_block - 1) // key_block, visit, carry)
        attended = (attended / total[..., None]).astype(q.dtype)
        return _ungrouped(attended, (q.shape[0], block, *q.shape[2:]))

    if num_blocks == 1:
        return block_of(0)
    blocks = jax.lax.map(block_of, jnp.arange(num_blocks))
    return jnp.moveaxis(blocks, 0, 1).reshape(padded.shape)[:, :length]


def _grouped(q: Float[Array, 'B T N H'], num_kv_heads: int) -> Float[Array, 'B K G T H']:
    """Queries with those that read the same keys side by side."""
    batch, length, num_heads, head_dim = q.shape
    return q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(
        0, 2, 3, 1, 4
    )


def _ungrouped(out: Float[Array, 'B K G T H'], shape: tuple[int, ...]) -> Float[Array, 'B T N H']:
    return out.transpose(0, 3, 1, 2, 4).reshape(shape)


def _product(equation: str, x: Float[Array, 'B K G T _'], cache: Array, dtype: Any = None) -> Array:
    """Of all queries that read the same keys with them, as one matrix: of more axes XLA for CPUs copies the cache."""
    matrix = x.reshape(*x.shape[:2], -1, x.shape[4])
    out = jnp.einsum(equation, matrix, cache.astype(x.dtype), preferred_element_type=dtype)
    return out.reshape(*x.shape[:4], -1)


def _scores(
    grouped: Float[Array, 'B K G T H'], keys: Array, start: Int[Array, 'B'], slots: Int[Array, 'S']
) -> Float[Array, 'B K G T S']:
    """Scaled products with the keys of these slots, masked where a slot is after the query's."""
    scores = _product('bkmh,bksh->bkms', grouped, keys, jnp.float32)
    places = start[:, None] + jnp.arange(grouped.shape[3])[None, :]
    mask = places[:, :, None] >= slots[None, None, :]
    return jnp.where(mask[:, None, None], scores * grouped.shape[-1] ** -0.5, _MASKED)
