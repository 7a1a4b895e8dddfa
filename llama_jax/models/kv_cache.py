"""The keys and values of the tokens already read: an explicit argument and return value, never hidden state.

Every layer has arrays of its own, heads first: what a step adds is written where it goes, and the products of attention
read the arrays as they lie. One array of all layers would be sliced, so copied, in every step.

A cache of int8 holds codes with a scale for each token and head, and everyone sees what it holds: the tokens of a piece
see each other rounded too, though their keys and values are still at hand. So it is no matter in which pieces a prompt
is read, nor whether another request has read its beginning.

On a TPU a cache may be of pages instead (`ops.attention.cache_layout`), tokens first: who writes it or reads it finds
the same methods.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.ops.attention import cache_layout, cached_attention, paged_cached_attention, platform_of
from llama_jax.ops.attention_cached import Cached, keys_as_codes, keys_of_codes, values_as_codes
from llama_jax.ops.attention_paged import as_pages
from llama_jax.ops.quantized import QuantizedArray
from llama_jax.partitioning import LogicalAxes, Partitioner

# Logical axes of each layer's keys and values. The scales of int8 have as many, the last of them of one value.
_HEADS_FIRST: LogicalAxes = ('batch', 'kv_heads', None, 'head_dim')
# The same of pages.
_TOKENS_FIRST: LogicalAxes = ('batch', None, 'kv_heads', 'head_dim')

# Names of what a cache may be made of: 'auto' is the type of the computation.
CACHE_DTYPES = ('auto', 'int8')


def cache_dtype(name: str, computation: jax.typing.DTypeLike) -> jnp.dtype:
    """What a cache of this name, one of `CACHE_DTYPES`, is made of beside a computation in such a type.

    Raises:
      InputError: an unknown name.
    """
    if name not in CACHE_DTYPES:
        raise InputError(f'unknown type of the cache {name!r}; choose from {", ".join(CACHE_DTYPES)}')
    return jnp.dtype(computation if name == 'auto' else name)


@flax.struct.dataclass
class LayerCache:
    """Rotated keys and values of one layer.

    Attributes:
      keys: slot s of row b holds that row's token s.
      values: as `keys`.
      length: tokens each row has read; what lies beyond is unused and never seen.
      is_empty: see `KVCache`.
    """

    keys: Cached
    values: Cached
    length: Int[Array, 'B']
    is_empty: bool = flax.struct.field(pytree_node=False, default=False)

    def as_held(
        self, k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H']
    ) -> tuple[Float[Array, 'B T K H'], Float[Array, 'B T K H']]:
        """New keys and values as who reads the cache finds them: those of int8 are rounded."""
        if not isinstance(self.keys, QuantizedArray):
            return k, v
        held = keys_of_codes(keys_as_codes(k)), values_as_codes(v).materialize()
        return held[0].astype(k.dtype), held[1].astype(v.dtype)

    def attend(self, q: Float[Array, 'B T N H'], partitioner: Partitioner | None) -> Float[Array, 'B T N H']:
        """What queries of the tokens that were written last find: see `ops.attention.cached_attention`."""
        return cached_attention(q, self.keys, self.values, self.length, partitioner)

    def write(self, k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H']) -> 'LayerCache':
        """Puts T new tokens after those each row has; `length` moves only by `KVCache.advance`.

        That a row has room for them is for the caller to see to: its length is known on the device only.
        """
        _check_room(k, self.keys.shape[2])
        new = (keys_as_codes(k), values_as_codes(v)) if isinstance(self.keys, QuantizedArray) else (k, v)
        keys, values = jax.tree.map(self._put, (self.keys, self.values), new)
        return dataclasses.replace(self, keys=keys, values=values)

    def _put(self, cache: Array, new: Array) -> Array:
        # A scatter with rows and heads as its batch, which splits over devices as they do. A place of one row alone
        # would become an update of a slice, which XLA for CPUs copies the cache for when a product reads it next.
        axes = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(2,),
            operand_batching_dims=(0, 1), scatter_indices_batching_dims=(0, 1),
        )  # fmt: skip
        places = jnp.broadcast_to(self.length[:, None, None], (*cache.shape[:2], 1))
        return jax.lax.scatter(
            cache, places, new.astype(cache.dtype).transpose(0, 2, 1, 3), axes,
            indices_are_sorted=True, unique_indices=True, mode='clip',
        )  # fmt: skip


@flax.struct.dataclass
class LayerPages:
    """As `LayerCache`, in pages.

    Attributes:
      pages: token s of row b, of each head its rotated key before its value.
      length: see `LayerCache`.
      is_empty: see `KVCache`.
    """

    pages: Float[Array, 'B S KV H']
    length: Int[Array, 'B']
    is_empty: bool = flax.struct.field(pytree_node=False, default=False)

    def as_held(
        self, k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H']
    ) -> tuple[Float[Array, 'B T K H'], Float[Array, 'B T K H']]:
        """See `LayerCache.as_held`."""
        return k, v

    def attend(self, q: Float[Array, 'B T N H'], partitioner: Partitioner | None) -> Float[Array, 'B T N H']:
        """See `LayerCache.attend`."""
        return paged_cached_attention(q, self.pages, self.length, partitioner)

    def write(self, k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H']) -> 'LayerPages':
        """See `LayerCache.write`."""
        _check_room(k, self.pages.shape[1])
        axes = jax.lax.ScatterDimensionNumbers(
            (1, 2, 3), (), (1,), operand_batching_dims=(0,), scatter_indices_batching_dims=(0,)
        )
        pages = jax.lax.scatter(
            self.pages, self.length[:, None], as_pages(k, v).astype(self.pages.dtype), axes,
            indices_are_sorted=True, unique_indices=True, mode='clip',
        )  # fmt: skip
        return dataclasses.replace(self, pages=pages)


def _check_room(k: Float[Array, 'B T K H'], room: int) -> None:
    if k.shape[1] > room:
        raise ValueError(f'{k.shape[1]} tokens do not fit into a cache of {room} slots')


@flax.struct.dataclass
class KVCache:
    """Rotated keys and values of every layer.

    Attributes:
      keys: of each layer, heads first; see `LayerCache`. () in a cache of pages.
      values: as `keys`.
      length: tokens each row has read.
      is_empty: it is said, before anything runs, that `length` is 0: new tokens then see each other alone, through the
        kernels of training. `advance` takes it back.
      pages: of each layer, tokens first; see `LayerPages`. () in a cache that is heads first.
    """

    keys: tuple[Cached, ...]
    values: tuple[Cached, ...]
    length: Int[Array, 'B']
    is_empty: bool = flax.struct.field(pytree_node=False, default=False)
    pages: tuple[Float[Array, 'B S KV H'], ...] = ()

    @classmethod
    def create(
        cls, config: LlamaConfig, batch_size: int, max_len: int, dtype=jnp.bfloat16, in_pages: bool = False
    ) -> 'KVCache':
        """An empty cache for `max_len` tokens a row; of codes with scales where `dtype` is int8."""
        if in_pages:
            shape = (batch_size, max_len, 2 * config.num_kv_heads, config.head_dim)
            pages = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
            return cls((), (), jnp.zeros((batch_size,), jnp.int32), pages=pages)
        shape = (batch_size, config.num_kv_heads, max_len, config.head_dim)

        def empty() -> Cached:
            array = jnp.zeros(shape, dtype)
            if dtype != jnp.int8:
                return array
            return QuantizedArray(array, jnp.zeros((*shape[:3], 1), jnp.float32))

        # An array each: one that stood in several places could not be given away to be written.
        keys, values = (tuple(empty() for _ in range(config.num_layers)) for _ in range(2))
        return cls(keys, values, jnp.zeros((batch_size,), jnp.int32))

    @classmethod
    def chosen(
        cls,
        config: LlamaConfig,
        batch_size: int,
        max_len: int,
        name: str,
        computation: jax.typing.DTypeLike,
        partitioner: Partitioner | None,
    ) -> 'KVCache':
        """An empty cache as suits the devices, which it is not yet placed on.

        Args:
          config: of the model.
          batch_size: rows.
          max_len: tokens of a row that there is room for.
          name: what it is made of, one of `CACHE_DTYPES`.
          computation: the type of the computation.
          partitioner: where the rows will be.

        Raises:
          InputError: an unknown name.
        """
        # A CPU multiplies in float32, and would convert all of another type for every product with it.
        dtype = cache_dtype(name, jnp.float32 if platform_of(partitioner) == 'cpu' else computation)
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        in_pages = cache_layout(*heads, dtype, partitioner) == 'pages'
        return cls.create(config, batch_size, max_len, dtype, in_pages)

    @property
    def arrays(self) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """All that is kept of tokens, in the tree that `with_arrays` takes."""
        return self.keys, self.values, self.pages

    @property
    def axes(self) -> LogicalAxes:
        """Logical axes of each of the arrays."""
        return _TOKENS_FIRST if self.pages else _HEADS_FIRST

    @property
    def token_axis(self) -> int:
        """Axis of each of the arrays along which a row's tokens lie."""
        return self.axes.index(None)

    @property
    def max_len(self) -> int:
        """Tokens of a row that there is room for."""
        return (self.pages or self.keys)[0].shape[self.token_axis]

    def with_arrays(self, arrays: Any) -> 'KVCache':
        """With others of the same layout."""
        keys, values, pages = arrays
        return dataclasses.replace(self, keys=keys, values=values, pages=pages)

    def map(self, change: Callable[[Array], Array]) -> 'KVCache':
        """With all keys and values changed."""
        return self.with_arrays(jax.tree.map(change, self.arrays))

    def take_rows(self, rows: Int[Array, 'P']) -> 'KVCache':
        """A copy of some rows; any for one that is not there."""

        def take(array: Array) -> Array:
            if len(rows) == 1:  # a copy, where XLA's CPU gathers number by number
                return jax.lax.dynamic_slice_in_dim(array, rows[0], 1)
            return jnp.take(array, rows, axis=0, mode='clip')

        taken = self.map(take)
        return dataclasses.replace(taken, length=jnp.take(self.length, rows, mode='clip'))

    def put_rows(
        self, rows: Int[Array, 'P'], other: 'KVCache', start: Int[Array, 'P'] | None = None, width: int = 0
    ) -> 'KVCache':
        """With `width` tokens of other rows from `start` on, or all, and their lengths, where these rows are there."""
        axis = self.token_axis
        axes = jax.lax.ScatterDimensionNumbers((1, 2, 3), (0,), (0, axis))
        places = jnp.stack([rows, jnp.zeros_like(rows) if start is None else start], axis=1)

        def of_row(row: Array, start: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(row, start, width, axis - 1)

        def put(array: Array, other: Array) -> Array:
            if start is None:
                new = other
            elif len(rows) == 1:
                new = of_row(other[0], start[0])[None]
            else:
                new = jax.vmap(of_row)(other, start)
            return jax.lax.scatter(array, places, new, axes, unique_indices=True, mode='drop')

        put_in = self.with_arrays(jax.tree.map(put, self.arrays, other.arrays))
        length = self.length.at[rows].set(other.length, mode='drop')
        return dataclasses.replace(put_in, length=length, is_empty=False)

    def layer(self, layer: int) -> LayerCache | LayerPages:
        """One layer's part."""
        if self.pages:
            return LayerPages(self.pages[layer], self.length, self.is_empty)
        return LayerCache(self.keys[layer], self.values[layer], self.length, self.is_empty)

    def with_layers(self, layers: list[LayerCache] | list[LayerPages]) -> 'KVCache':
        """What all layers have written."""
        names = ('pages',) if self.pages else ('keys', 'values')
        written = {name: tuple(getattr(layer, name) for layer in layers) for name in names}
        return dataclasses.replace(self, **written)

    def advance(self, num_tokens: Int[Array, 'B'] | int) -> 'KVCache':
        """Counts tokens as read. A row whose last tokens were padding counts only its own: the rest is overwritten."""
        return dataclasses.replace(self, length=self.length + num_tokens, is_empty=False)
