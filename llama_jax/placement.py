"""Global arrays out of files: each block of a weight is read once a process, and cut for all its devices.

A callback a device, as `jax.make_array_from_callback` asks for, would read a file as often as there are replicas, and
whole rows for every slice of their columns.
"""

import functools
import itertools
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.storage import prefetch
from llama_jax.types import Array, InputError, LazyArray

Index: TypeAlias = tuple[slice, ...]

_BFLOAT16 = np.dtype(jnp.bfloat16)
# A tile of values that lie transposed: both its rows and its columns fill whole cache lines and stay in the cache.
_TILE = (256, 64)
# Blocks of one weight that are read at once.
_THREADS = min(max((os.cpu_count() or 1) // 2, 2), 8)
# Bytes from which on memory is asked for in pages of 2 MiB: what is fresh is then there in a tenth of the time.
_LARGE_BYTES = 4 << 20
# Memory that begins at a multiple of so many bytes becomes an array of the CPU without another copy.
_ALIGNMENT = 64


class BlockArray(LazyArray, Protocol):
    """A weight in a file, that knows by which pieces it is best read."""

    def blocks(self) -> Iterable[Index]:
        """Indices that cover the array, none of them twice; each is read at once, and small beside the memory."""
        ...


def place(array: BlockArray, wanted: jax.ShapeDtypeStruct, name: str) -> Array:
    """The array cast and placed as `wanted` says; of each block this process reads what its devices hold, once.

    Args:
      array: of the same shape.
      wanted: dtype and sharding.
      name: of the weight, for messages.

    Raises:
      InputError: a value is beyond the range of float16.
    """
    shape, dtype = tuple(wanted.shape), np.dtype(wanted.dtype)
    assert tuple(array.shape) == shape, name
    indices = wanted.sharding.addressable_devices_indices_map(shape).values()
    pieces = {span: _zeros([stop - start for start, stop in span], dtype) for span in _spans(indices, shape)}

    def fill(parts: dict[_Span, _Span]) -> None:
        box = tuple(
            (min(s for s, _ in axis), max(e for _, e in axis)) for axis in zip(*parts.values(), strict=True)
        )
        values = array.read(tuple(slice(*span) for span in box))
        if dtype != values.dtype and dtype == np.float16:
            values = cast(values, dtype, name)
        for span, part in parts.items():
            _copy(pieces[span][_within(part, span)], values[_within(part, box)])

    jobs = []
    for block in _spans(array.blocks(), shape):
        if parts := {span: part for span in pieces if (part := _overlap(span, block))}:
            jobs.append(functools.partial(fill, parts))
    for _ in prefetch(jobs, _THREADS):
        pass
    return jax.make_array_from_callback(
        shape, wanted.sharding, lambda index: pieces[next(_spans([index], shape))], dtype=dtype
    )


_Span: TypeAlias = tuple[tuple[int, int], ...]


def _spans(indices: Iterable[Index | None], shape: tuple[int, ...]) -> Iterator[_Span]:
    """Start and stop along every axis: what can be compared, and be a key."""
    for index in indices:
        yield tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))


def _overlap(a: _Span, b: _Span) -> _Span | None:
    both = tuple((max(s, t), min(e, f)) for (s, e), (t, f) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _within(part: _Span, whole: _Span) -> Index:
    return tuple(slice(s - begin, e - begin) for (s, e), (begin, _) in zip(part, whole, strict=True))


def _zeros(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Fresh zeros, which take no time before they are written, where XLA's CPU takes them as they are."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes >= _LARGE_BYTES and hasattr(mmap, 'MADV_HUGEPAGE'):
        memory = mmap.mmap(-1, num_bytes)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype).reshape(shape)
    memory = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _copy(zeros: np.ndarray, values: np.ndarray) -> None:
    """Copies and casts into what is zero; the values may be a transposed view."""
    widened = zeros.dtype == np.float32 and values.dtype == _BFLOAT16 and zeros.shape[-1:] != ()
    if widened and zeros.strides[-1] == zeros.itemsize:
        # bfloat16 is the upper half of float32, so one pass transposes and casts; the lower half is zero already.
        zeros, values = zeros.view(np.uint16)[..., 1::2], values.view(np.uint16)
    elif values.dtype != zeros.dtype:
        values = values.astype(zeros.dtype)  # in the values' own order
    copy_tiles(zeros, values)


def copy_tiles(out: np.ndarray, values: np.ndarray) -> None:
    """Copies an array into another of its shape and type, however both lie: NumPy alone takes thrice as long.

    Where they lie crosswise, tile by tile, so that every cache line is used whole.
    """
    last = values.ndim - 1
    axis = min(range(values.ndim), key=lambda a: (values.shape[a] == 1, values.strides[a], -a), default=last)
    if axis == last or not values.size:
        out[...] = values
        return
    # As wholes of bits: NumPy copies types that it does not know one value at a time.
    if out.dtype == values.dtype and out.itemsize in (2, 4):
        out, values = (x.view(f'u{x.itemsize}') for x in (out, values))
    others = [size for a, size in enumerate(values.shape) if a not in (axis, last)]
    outs, ins = (np.moveaxis(x, (axis, last), (-2, -1)) for x in (out, values))
    for index in itertools.product(*map(range, others)):
        target, source = outs[index], ins[index]
        for column in range(0, source.shape[1], _TILE[1]):
            for row in range(0, source.shape[0], _TILE[0]):
                tile = slice(row, row + _TILE[0]), slice(column, column + _TILE[1])
                target[tile] = source[tile]


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The values in another floating-point type.

    Raises:
      InputError: the type is float16, and a finite value beyond its range; `name` says where.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over='ignore', invalid='ignore'):  # the latter for a signalling NaN
        converted = values.astype(dtype)
    if dtype == np.float16 and (lost := np.isinf(converted) & np.isfinite(values)).any():
        raise InputError(
            f'{name} holds {values[lost][0]}, which float16 cannot (at most 65504); convert to bfloat16 or float32'
        )
    return converted
