"""Causal attention on a CPU, one head after the other; no gradients.

XLA's CPU multiplies the matrices of several heads on a single core, one large matrix on all of them. So of each head a
block of queries meets all keys up to its last one at once: what lies behind the diagonal's own block is never computed,
and no running softmax is needed. The scores of a single head are in memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Queries that meet keys at a time. Of fewer a head's product is left to a single core too.
_BLOCK = 256
# With more keys than this the scores of a block would leave the caches of a core.
_MAX_LENGTH = 1024
_MASKED = float(jnp.finfo(jnp.float32).min)


def serves(length: int) -> bool:
    """Whether rows of so many tokens are read faster so."""
    return _BLOCK < length <= _MAX_LENGTH


def serves_behind(num_rows: int, length: int, num_slots: int) -> bool:
    """Whether so many tokens behind others, in a cache of so many slots, are read faster so."""
    return num_rows == 1 and length % _BLOCK == num_slots % _BLOCK == 0


def attend_by_heads(
    q: Float[Array, 'B T N H'], k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H']
) -> Float[Array, 'B T N H']:
    """Attention of each token to those of its row up to itself, in fp32; the queries begin their rows.

    Args:
      q: rotated queries.
      k: rotated keys.
      v: values.
    """
    batch, length, num_heads, head_dim = q.shape
    keys, values = (x.astype(jnp.float32).transpose(0, 2, 1, 3).reshape(-1, length, head_dim) for x in (k, v))

    def attend(
        queries: Float[Array, 'T H'], keys: Float[Array, 'T H'], values: Float[Array, 'T H']
    ) -> Float[Array, 'T H']:
        attended = []
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            attended.append(_attend(queries[start:end], keys[:end], values[:end], start))
        return jnp.concatenate(attended)

    out = _head_by_head(attend, _scaled(q, len(keys)), keys, values, length)
    return out.reshape(batch, num_heads, length, head_dim).transpose(0, 2, 1, 3).astype(q.dtype)


def attend_behind(
    q: Float[Array, '1 T N H'],
    keys: Float[Any, '1 K S H'],
    values: Float[Any, '1 K S H'],
    start: Int[Array, '1'],
    attend_far: Callable[..., Float[Array, '1 T N H']],
) -> Float[Array, '1 T N H']:
    """The same of queries behind others of a row, whose keys and values are in a cache, as their own are too.

    A block of them meets as many blocks of keys as it sees, however large the cache is: so its bits do not depend on
    that.

    Args:
      q: rotated queries at slots start[0], start[0] + 1, ...
      keys: rotated keys.
      values: as the keys.
      start: tokens before the queries.
      attend_far: (queries of a block, keys, values, start) -> the same, of those too far for their scores to be cached.
    """
    _, length, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = keys.shape[1:3]
    sizes = range(_BLOCK, min(num_slots, _MAX_LENGTH) + 1, _BLOCK)

    def of_block(index: Int[Array, '']) -> Float[Array, 'N T H']:
        queries, first = jax.lax.dynamic_slice_in_dim(q, index * _BLOCK, _BLOCK, 1), start[0] + index * _BLOCK

        def see(size: int) -> Float[Array, 'N T H']:
            own, attend = _scaled(queries, num_kv_heads), functools.partial(_attend, start=first)
            out = _head_by_head(attend, own, keys[0], values[0], size)
            return out.reshape(num_heads, _BLOCK, head_dim)

        branches: list[Callable[[], Array]] = [functools.partial(see, size) for size in sizes]
        if num_slots > _MAX_LENGTH:
            branches.append(lambda: attend_far(queries, keys, values, first[None])[0].transpose(1, 0, 2))
        return jax.lax.switch((first - 1) // _BLOCK + 1, branches)

    out = jax.lax.map(of_block, jnp.arange(length // _BLOCK))
    return out.transpose(0, 2, 1, 3).reshape(q.shape)


def _scaled(q: Float[Array, 'B T N H'], num_groups: int) -> Float[Array, 'BK G T H']:
    """Queries of so many groups, each with those that read the same keys."""
    batch, length, num_heads, head_dim = q.shape
    queries = (q.astype(jnp.float32) * head_dim**-0.5).transpose(0, 2, 1, 3)
    return queries.reshape(num_groups, batch * num_heads // num_groups, length, head_dim)


def _head_by_head(
    attend: Callable[..., Float[Array, 'T H']],
    queries: Float[Array, 'BK G T H'],
    keys: Float[Array, 'BK S H'],
    values: Float[Array, 'BK S H'],
    num_keys: int,
) -> Float[Array, 'BK G T H']:
    """Each head's queries with so many keys, which are cut out head by head: all at once would be a copy."""

    def of_group(item: tuple[Array, Array]) -> Float[Array, 'G T H']:
        index, own = item
        shape = 1, num_keys, keys.shape[2]
        k, v = (jax.lax.dynamic_slice(x, (index, 0, 0), shape)[0] for x in (keys, values))
        return jax.lax.map(lambda head: attend(head, k, v), own)

    return jax.lax.map(of_group, (jnp.arange(len(queries)), queries))


def _attend(
    queries: Float[Array, 'T H'],
    keys: Float[Array, 'S H'],
    values: Float[Array, 'S H'],
    start: Int[Array, ''] | int,
) -> Float[Array, 'T H']:
    """Of one head, scaled queries of which the first has so many keys before its own."""
    scores = queries @ keys.T
    mask = start + jnp.arange(len(queries))[:, None] >= jnp.arange(len(keys))[None, :]
    scores = jnp.where(mask, scores, _MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights @ values / jnp.sum(weights, axis=1, keepdims=True)
