"""Keys and values of some tokens, out of a row of a cache and into another."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Int

from llama_jax.models.kv_cache import KVCache


@functools.partial(jax.jit, static_argnames='width')
def copy_block(cache: KVCache, slot: Int[Array, ''], start: Int[Array, ''], width: int) -> Any:
    """Keys and values of `width` tokens of a row, from `start` on."""

    def copy(array: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(array, slot, keepdims=False)
        return jax.lax.dynamic_slice_in_dim(row, start, width, axis=cache.token_axis - 1)

    return jax.tree.map(copy, cache.arrays)


@functools.partial(jax.jit, donate_argnames='cache')
def put_block(
    cache: KVCache, slot: Int[Array, ''], start: Int[Array, ''], block: Any, length: Int[Array, '']
) -> KVCache:
    """The cache with what `copy_block` gave in a row, of which then so many tokens count."""

    def put(array: Array, block: Array) -> Array:
        where = {0: slot, cache.token_axis: start}
        return jax.lax.dynamic_update_slice(array, block[None], [where.get(axis, 0) for axis in range(4)])

    written = cache.with_arrays(jax.tree.map(put, cache.arrays, block))
    return dataclasses.replace(written, length=cache.length.at[slot].set(length))
