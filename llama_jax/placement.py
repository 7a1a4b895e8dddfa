"""Global arrays out of files: each block of a weight is read once, and cut for all the devices that hold some of it.

A callback a device, as `jax.make_array_from_callback` asks for, would read a file as often as there are replicas, and
whole rows for every slice of their columns; so would processes that each read for themselves.
"""

import dataclasses
import functools
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llama_jax.errors import InputError, error_line
from llama_jax.storage import prefetch
from llama_jax.types import Array, LazyArray

Index: TypeAlias = tuple[slice, ...]
_Span: TypeAlias = tuple[tuple[int, int], ...]  # start and stop along every axis

_BFLOAT16 = np.dtype(jnp.bfloat16)
# A tile of values that lie transposed: both its rows and its columns fill whole cache lines and stay in the cache.
_TILE = (256, 64)
# Blocks of one weight that are read at once.
_THREADS = min(max((os.cpu_count() or 1) // 2, 2), 8)
# What processes send each other: weights smaller than this each reads for itself; so many blocks are on the way at
# once, and so many bytes, for a device holds a message of every process.
_SMALL_BYTES = 16 << 10
_READERS = 16
_MESSAGES_BYTES = 256 << 20
# Bytes from which on memory is asked for in pages of 2 MiB: what is fresh is then there in a tenth of the time.
_LARGE_BYTES = 4 << 20
# Memory that begins at a multiple of so many bytes becomes an array of the CPU without another copy.
_ALIGNMENT = 64


class BlockArray(LazyArray, Protocol):
    """A weight in a file, that knows by which pieces it is best read.

    Attributes:
      rows_axis: along which a part of a block is read without the rest; None where a block is read whole.
    """

    @property
    def rows_axis(self) -> int | None:
        """The axis along which blocks are cut."""
        ...

    def blocks(self) -> Iterable[Index]:
        """Indices that cover the array, none of them twice; each is read at once, and small beside the memory."""
        ...


def place_all(
    arrays: Sequence[tuple[str, BlockArray, jax.ShapeDtypeStruct]],
    progress: Callable[[int], Any] = lambda _: None,
) -> list[Array]:
    """Weights by name, cast and placed as wanted; the processes of a job together read each block once.

    What one process alone has devices for, it reads. What several have devices for, one reads and sends to the others:
    over the network of the devices, which is faster than what files lie on. Every process makes the same call.

    Raises:
      InputError: a value is beyond the range of float16; or as the reading of blocks, of whichever process.
    """
    of_all = all(_processes(wanted) == set(range(jax.process_count())) for _, _, wanted in arrays)
    if jax.process_count() == 1 or not of_all:
        return list(prefetch(functools.partial(place, *array, progress=progress) for array in arrays))
    placed, exchange = [], _Exchange()
    for array in arrays:  # in one order on all processes
        try:
            placed.append(place(*array, exchange, progress))
        except Exception as error:
            if exchange.is_over:
                raise
            exchange.failure = (
                exchange.failure or error
            )  # the others hear of it when they next wait for this process
    if exchange.failure:
        raise exchange.failure
    return placed


def _processes(wanted: jax.ShapeDtypeStruct) -> set[int]:
    return {device.process_index for device in wanted.sharding.device_set}


def place(
    name: str,
    array: BlockArray,
    wanted: jax.ShapeDtypeStruct,
    exchange: '_Exchange | None' = None,
    progress: Callable[[int], Any] = lambda _: None,
) -> Array:
    """The array cast and placed as `wanted` says; of each block this process reads what its devices hold, once.

    Args:
      name: of the weight, for messages.
      array: of the same shape.
      wanted: dtype and sharding.
      exchange: with the other processes, which place their parts of it.
      progress: called with the bytes of each block placed.

    Raises:
      InputError: a value is beyond the range of float16.
    """
    shape, dtype = tuple(wanted.shape), np.dtype(wanted.dtype)
    assert tuple(array.shape) == shape, name
    indices = wanted.sharding.addressable_devices_indices_map(shape).values()
    pieces = {span: _zeros([stop - start for start, stop in span], dtype) for span in _spans(indices, shape)}

    def fill(block: _Span, values: np.ndarray | None = None) -> None:
        if not (parts := {span: part for span in pieces if (part := _overlap(span, block))}):
            return
        if values is None:
            block = _cover(parts.values())
            values = array.read(tuple(slice(*span) for span in block))
        if dtype != values.dtype and dtype == np.float16:
            values = cast(values, dtype, name)
        for span, part in parts.items():
            _copy(pieces[span][_within(part, span)], values[_within(part, block)])
        progress(math.prod(stop - start for start, stop in block) * dtype.itemsize)

    blocks = list(_spans(array.blocks(), shape))
    shared = _shared(blocks, array, wanted) if exchange else []
    if exchange and shared:
        for block, values in exchange.share(array, shared):
            try:
                fill(block, values)
            except InputError as error:  # and yet takes part in what is left: the others wait for it
                exchange.failure = exchange.failure or error
    for _ in prefetch((functools.partial(fill, block) for block in blocks if block not in shared), _THREADS):
        pass
    return jax.make_array_from_callback(
        shape, wanted.sharding, lambda index: pieces[next(_spans([index], shape))], dtype=dtype
    )


def _shared(blocks: Sequence[_Span], array: BlockArray, wanted: jax.ShapeDtypeStruct) -> list[_Span]:
    """The blocks of which several processes would read the same bytes."""
    if math.prod(array.shape) * array.dtype.itemsize < _SMALL_BYTES:
        return []
    needed: dict[int, set[_Span]] = {}
    for device, index in wanted.sharding.devices_indices_map(tuple(array.shape)).items():
        needed.setdefault(device.process_index, set()).update(_spans([index], tuple(array.shape)))
    shared = []
    for block in blocks:
        parts = [[part for span in spans if (part := _overlap(span, block))] for spans in needed.values()]
        covers = [_cover(of_process) for of_process in parts if of_process]
        if len(covers) < 2:
            continue
        whole_rows = all(
            cover[axis] == block[axis]
            for cover in covers
            for axis in range(len(block))
            if axis != array.rows_axis
        )
        rows = sorted(cover[array.rows_axis] for cover in covers) if array.rows_axis is not None else []
        apart = bool(rows) and all(a[1] <= b[0] for a, b in itertools.pairwise(rows))
        if not (whole_rows and apart):
            shared.append(block)
    return shared


class _Exchange:
    """Blocks that several processes need, each read by one and sent to all; who fails says so instead.

    Attributes:
      failure: of this process, since the others last heard from it.
      is_over: all processes have heard of a failure, and none waits for another.
    """

    def __init__(self):
        self.failure: Exception | None = None
        self.is_over = False
        self._turn = 0  # of the process that reads the next block

    def share(self, array: BlockArray, blocks: Sequence[_Span]) -> Iterator[tuple[_Span, np.ndarray]]:
        """Every block with its values, on every process.

        Raises:
          InputError: another process has failed, with its message; or what this one has failed with.
        """
        count, own = jax.process_count(), jax.process_index()
        at_once = min(count, _READERS)
        sizes = [[stop - start for start, stop in block] for block in blocks]
        largest = max(map(math.prod, sizes)) * array.dtype.itemsize
        length = min(1 << max(largest - 1, 1).bit_length(), _MESSAGES_BYTES // count)
        turn, self._turn = self._turn, (self._turn + len(blocks)) % count
        reads = prefetch(
            functools.partial(self._bytes, array, block)
            for i, block in enumerate(blocks)
            if (turn + i) % count == own
        )
        for first in range(0, len(blocks), at_once):
            senders = {i: (turn + i) % count for i in range(first, min(first + at_once, len(blocks)))}
            data = next(reads) if own in senders.values() else b''
            received = {i: bytearray() for i in senders}
            for start in range(0, largest, length):
                for i, message in self._send(bytes(data[start : start + length]), length, senders).items():
                    received[i] += message.tobytes()
            for i in senders:
                values = np.frombuffer(received[i], array.dtype, math.prod(sizes[i]))
                yield blocks[i], values.reshape(sizes[i])

    def _bytes(self, array: BlockArray, block: _Span) -> memoryview:
        """A block in row-major order; nothing where it cannot be read."""
        try:
            values = array.read(tuple(slice(*span) for span in block))
            copy = np.empty(values.shape, array.dtype)
            copy_tiles(copy, values)
            return copy.reshape(-1).view(np.uint8).data
        except Exception as error:
            self.failure = self.failure or error
            return memoryview(b'')

    def _send(self, data: bytes, length: int, senders: dict[int, int]) -> dict[int, np.ndarray]:
        """One message of each sender, by block."""
        failed = self.failure is not None
        if failed:
            data = error_line(self.failure).encode()[:length] if self.failure else b''
        message = np.frombuffer(data.ljust(length, b'\0'), np.uint8)
        states, messages = multihost_utils.process_allgather((np.int32(len(data) if failed else -1), message))
        for process, size in enumerate(states.tolist()):
            if size >= 0:
                self.is_over = True
                text = messages[process, :size].tobytes().decode(errors='replace')
                raise self.failure or InputError(f'process {process}: {text}')
        return {i: messages[process] for i, process in senders.items()}


@dataclasses.dataclass(frozen=True)
class GrownTable:
    """A table [vocab, embed] with further rows, each the mean of those that were trained."""

    table: BlockArray
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """With the new rows."""
        return (self.num_rows, *self.table.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """The table's."""
        return self.table.dtype

    @property
    def rows_axis(self) -> int | None:
        """The table's."""
        return self.table.rows_axis

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """Of the rows that are stored."""
        total = np.zeros(self.shape[1:])
        for index in self.table.blocks():
            total[index[1]] += self.table.read(index).sum(axis=0, dtype=np.float64)
        return (total / self.table.shape[0]).astype(np.float32)

    def blocks(self) -> Iterator[Index]:
        """Those of the table, then the new rows."""
        yield from self.table.blocks()
        yield slice(self.table.shape[0], self.num_rows), slice(None)

    def read(self, index: Index) -> np.ndarray:
        """See `LazyArray`; new rows are the mean of the others."""
        start, stop, _ = index[0].indices(self.num_rows)
        if stop <= (trained := self.table.shape[0]):
            return self.table.read(index)
        assert start >= trained, 'no block has both'
        return np.broadcast_to(self.mean[index[1]], (stop - start, len(self.mean[index[1]])))


def _cover(parts: Iterable[_Span]) -> _Span:
    """The smallest block that holds all of them."""
    return tuple((min(s for s, _ in axis), max(e for _, e in axis)) for axis in zip(*parts, strict=True))


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
        # Of a mapping that may be shared, which is Python's own choice, Linux makes no large pages.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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
    if out.dtype == values.dtype and out.itemsize in (1, 2, 4):
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
