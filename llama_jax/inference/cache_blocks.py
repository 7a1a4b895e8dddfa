"""What moves between caches: keys and values of some tokens, from a row to another, and all rows into another room."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
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


def reshaped(rows: Any, num_rows: int, room: int) -> Any:
    """The first rows in a cache of another room; one array after the other, so that the old one is soon gone."""
    axis = rows.cache.token_axis

    def fitted(leaf: Array, room: int | None = None) -> Array:
        shape = (num_rows, *leaf.shape[1:])
        shape = shape if room is None else (*shape[:axis], room, *shape[axis + 1 :])
        if shape == leaf.shape:
            return leaf
        sharding = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
        new = _fitting(shape, sharding)(leaf)
        leaf.delete()
        return new

    arrays, structure = jax.tree.flatten(rows.cache.arrays)
    rows = dataclasses.replace(rows, cache=rows.cache.with_arrays(((), (), ())))
    for index in range(len(arrays)):
        arrays[index] = fitted(arrays[index], room)
    rows = jax.tree.map(fitted, rows)
    return dataclasses.replace(rows, cache=rows.cache.with_arrays(structure.unflatten(arrays)))


@functools.lru_cache(maxsize=256)
def _fitting(shape: tuple[int, ...], sharding: NamedSharding | None):
    def fit(array: Array) -> Array:
        array = array[tuple(slice(size) for size in shape)]
        return jnp.pad(array, [(0, size - kept) for size, kept in zip(shape, array.shape, strict=True)])

    return jax.jit(fit, out_shardings=sharding)
