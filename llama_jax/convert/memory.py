"""Weights in memory, on one device or on many, read in blocks as those of a file are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.convert.mapping import Source, native_source
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.ops.linear import Representation
from llama_jax.types import Params


@dataclasses.dataclass(frozen=True)
class HeldArray:
    """A weight that is in memory: a block of it is put together out of what the devices hold."""

    array: jax.Array | np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole, wherever its parts lie."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """As NumPy names it."""
        return np.dtype(self.array.dtype)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The block of these slices."""
        if isinstance(self.array, np.ndarray):
            return self.array[index]
        wanted = [slice(*s.indices(size)[:2]) for s, size in zip(index, self.shape, strict=True)]
        block: np.ndarray | None = None
        for shard in self.array.addressable_shards:
            held = [slice(*s.indices(size)[:2]) for s, size in zip(shard.index, self.shape, strict=True)]
            both = [
                slice(max(w.start, h.start), min(w.stop, h.stop)) for w, h in zip(wanted, held, strict=True)
            ]
            if shard.replica_id or any(s.start >= s.stop for s in both):
                continue
            values = _fetch(
                shard.data,
                [slice(b.start - h.start, b.stop - h.start) for b, h in zip(both, held, strict=True)],
            )
            if both == wanted:
                return values
            if block is None:
                block = np.empty([w.stop - w.start for w in wanted], self.dtype)
            block[
                tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(both, wanted, strict=True))
            ] = values
        return np.empty([max(w.stop - w.start, 0) for w in wanted], self.dtype) if block is None else block


def _fetch(data: jax.Array, index: list[slice]) -> np.ndarray:
    """A part of what one device holds; a CPU's is looked at where it is."""
    if next(iter(data.devices())).platform == 'cpu':
        return np.asarray(data)[tuple(index)]
    starts, sizes = [s.start for s in index], [s.stop - s.start for s in index]
    return np.asarray(jax.lax.dynamic_slice(data, starts, sizes))


def memory_source(config: LlamaConfig, params: Params) -> Source:
    """Params as a source, to be written in any format.

    Raises:
      InputError: a leaf is missing, of another shape, left over, or no array that can be read; it is named.
    """
    if isinstance(params.get('blocks'), tuple):
        raise InputError('params have the layers apart, as unstack leaves them; give those that it was given')
    leaves = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, Representation)
    ):
        path = jax.tree_util.keystr(keys, simple=True, separator='/')
        if reason := _unreadable(leaf):
            raise InputError(f'params: weight {path} {reason}')
        leaves[path] = HeldArray(leaf)
    return native_source(config, leaves, 'params')


def _unreadable(leaf: Any) -> str:
    """Why a leaf cannot be written; '' where it can."""
    if isinstance(leaf, Representation):
        return f'is a {type(leaf).__name__}; save writes arrays, so merge an adapter first, and save what was quantised'
    if not isinstance(leaf, jax.Array | np.ndarray):
        return f'is a {type(leaf).__name__}, which holds no values; give an array'
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f'holds {leaf.dtype}; weights are floating-point numbers'
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            return 'was deleted: a step of training that donates took it; give the params of its newest state'
        if not leaf.is_fully_addressable:
            return 'is spread over several processes; save it where one process has all of it'
    return ''
