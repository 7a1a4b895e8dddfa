"""A weight that stays on disk until a piece of it is read.

Nothing here ever holds a whole checkpoint: a piece is a block of rows and columns of one matrix, and a file is mapped
only as long as its piece is used, so that memory stays small however large the model.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from etils import epath

from llama_jax.errors import InputError
from llama_jax.placement import cast
from llama_jax.storage import read_range

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ALL = slice(None)
_BLOCK_BYTES = 32 << 20  # of a piece: large for a disk, small for the memory
_ROWS_COMPARED = 8
_STRIP_BYTES = 4 << 20  # mapped at once where only some columns are read


@runtime_checkable
class Tensor(Protocol):
    """A vector or matrix whose pieces are read on demand, each by any number of threads.

    Attributes:
      shape: one or two sizes.
      dtype: of the pieces; a quantised tensor reads as float32.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of what is read."""
        ...

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """The block [rows, columns], slices of step 1; a vector has rows only. The array may be read-only."""
        ...


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """Values that lie in row-major order at one place of a file, which may be in a bucket.

    Attributes:
      path: the file. The caller has checked that it is long enough.
      offset: of the first value, in bytes.
      shape: one or two sizes.
      dtype: little-endian.
    """

    path: epath.Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`."""
        start, stop, _ = rows.indices(self.shape[0])
        shape = (max(stop - start, 0), *self.shape[1:])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if len(shape) == 1 or columns.indices(shape[1])[:2] == (0, shape[1]):
            return read_array(self.path, self.offset + start * row_bytes, shape, self.dtype)
        # Of columns, a strip of rows at a time: all of the rows would be in memory together, to be cut.
        first, last, _ = columns.indices(shape[1])
        block = np.empty((shape[0], max(last - first, 0)), self.dtype)
        for strip in row_blocks(shape, self.dtype, limit=_STRIP_BYTES):
            offset = self.offset + (start + strip.start) * row_bytes
            rows_read = (strip.stop - strip.start, shape[1])
            block[strip] = read_array(self.path, offset, rows_read, self.dtype)[:, columns]
        return block


@dataclasses.dataclass(frozen=True)
class StridedTensor:
    """A view of a storage whose values do not lie row after row: transposed, cut out, or repeated.

    Attributes:
      path: the file. The caller has checked that it holds all that the view reaches.
      offset: of the first value, in bytes.
      shape: one or two sizes.
      strides: of each axis, in values.
      dtype: little-endian.
    """

    path: epath.Path
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`."""
        spans = [slice(*s.indices(size)[:2]) for s, size in zip((rows, columns), self.shape, strict=False)]
        sizes = [max(span.stop - span.start, 0) for span in spans]
        if not math.prod(sizes):
            return np.zeros(sizes, self.dtype)
        begin = sum(span.start * stride for span, stride in zip(spans, self.strides, strict=True))
        reach = 1 + sum((size - 1) * stride for size, stride in zip(sizes, self.strides, strict=True))
        item = self.dtype.itemsize
        values = read_array(self.path, self.offset + begin * item, (reach,), self.dtype)
        strides = [stride * item for stride in self.strides]
        return np.lib.stride_tricks.as_strided(values, sizes, strides, writeable=False)


def read_array(path: epath.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array at `offset` bytes of a file: mapped where the file is local, so that only what is used is read."""
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    if '://' not in os.fspath(path):
        return np.memmap(path, dtype, mode='r', offset=offset, shape=shape).view(np.ndarray)
    return np.frombuffer(read_range(path, offset, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Concatenated:
    """Parts of one tensor, side by side along an axis, as model-parallel shards hold it."""

    parts: Sequence[Tensor]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parts together."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the parts, which have one."""
        return self.parts[0].dtype

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`."""
        index = [rows, columns]
        start, stop, _ = index[self.axis].indices(self.shape[self.axis])
        blocks, begin = [], 0
        for part in self.parts:
            size = part.shape[self.axis]
            inside = slice(max(start - begin, 0), min(stop - begin, size))
            if inside.start < inside.stop:
                blocks.append(part.read(*(inside if axis == self.axis else index[axis] for axis in (0, 1))))
            begin += size
        if not blocks:
            return self.parts[0].read(*(slice(0, 0) if axis == self.axis else index[axis] for axis in (0, 1)))
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, self.axis)


@dataclasses.dataclass(frozen=True)
class Tied:
    """One tensor that a checkpoint holds twice; whoever reads a piece of it reads it of both and compares.

    Attributes:
      tensor: the one.
      copy: the other.
      refusal: the message where they differ after all.
    """

    tensor: Tensor
    copy: Tensor
    refusal: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the one that is kept."""
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the one that is kept."""
        return self.tensor.dtype

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`; the other one must hold the same."""
        block = self.tensor.read(rows, columns)
        if not same_bits(block, self.copy.read(rows, columns)):
            raise InputError(self.refusal)
        return block


def tie(tensor: Tensor, copy: Tensor, refusal: str) -> Tensor | None:
    """The one tensor that both are, or None where they differ in one of the few rows that are compared at once.

    Comparing all of them at once would read them twice: they are read again to be used.
    """
    if tensor == copy:
        return tensor
    if (tensor.shape, tensor.dtype) != (copy.shape, copy.dtype):
        return None
    last = tensor.shape[0] - 1
    for row in sorted({last * i // (_ROWS_COMPARED - 1) for i in range(_ROWS_COMPARED)}):
        if not same_bits(tensor.read(slice(row, row + 1)), copy.read(slice(row, row + 1))):
            return None
    return Tied(tensor, copy, refusal)


@dataclasses.dataclass(frozen=True)
class HalfSplit:
    """The query or key rows of Meta's order, each head's RoPE pairs side by side, as half-split: pairs H/2 rows apart.

    Source of the permutation: Meta's row 2j + p of a head is Hugging Face's row p * H/2 + j
    (transformers' convert_llama_weights_to_hf.py).
    """

    interleaved: Tensor
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the interleaved one."""
        return self.interleaved.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the interleaved one."""
        return self.interleaved.dtype

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`."""
        start, stop, _ = rows.indices(self.shape[0])
        first, last = start // self.head_dim, -(-stop // self.head_dim)  # whole heads that cover the rows
        heads = self.interleaved.read(slice(first * self.head_dim, last * self.head_dim), columns)
        begin = start - first * self.head_dim
        return to_half_split(heads, self.head_dim)[begin : begin + max(stop - start, 0)]


def to_half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [n * H, D] of whole heads, from interleaved to half-split."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def to_interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [n * H, D] of whole heads, from half-split to interleaved."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """A vector or matrix that is worked out of others when a piece of it is read, and never as a whole.

    Attributes:
      shape: one or two sizes.
      stored_dtype: the type of what it is made of.
      compute: the block of rows and columns, in float32, or float64 where that is stored.
    """

    shape: tuple[int, ...]
    stored_dtype: np.dtype
    compute: Callable[[slice, slice], np.ndarray]

    @property
    def dtype(self) -> np.dtype:
        """In which it is computed."""
        return np.dtype(np.float64 if self.stored_dtype == np.float64 else np.float32)

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`."""
        return self.compute(rows, columns).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """What was worked out, cast once, to the type of what it was made of."""

    tensor: Computed
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        """To which it is rounded."""
        return self.tensor.stored_dtype

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`."""
        return cast(self.tensor.read(rows, columns), self.dtype, self.name)


def row_blocks(shape: tuple[int, ...], dtype: np.dtype, multiple: int = 1, limit: int = 0) -> list[slice]:
    """Ranges of rows that cover a tensor: each some `limit` bytes (0: 32 MiB), a multiple of `multiple` rows."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    step = max((limit or _BLOCK_BYTES) // (row_bytes * multiple), 1) * multiple
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same to the last bit, NaN and the sign of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = f'u{a.dtype.itemsize}'
    return np.array_equal(a.view(bits), b.view(bits))


def same_values(a: Tensor, b: Tensor, rows: int | None = None) -> bool:
    """Whether two tensors (or their first rows) are equal bit by bit; reads little where they are not."""
    if a == b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    blocks = [slice(0, rows)] if rows else [slice(0, 1), *row_blocks(a.shape, a.dtype)]
    return all(same_bits(a.read(block), b.read(block)) for block in blocks)


def existing(path: epath.PathLike) -> epath.Path:
    """The place of a checkpoint's file or folder.

    Raises:
      InputError: nothing is there.
    """
    place = epath.Path(path)
    if not place.exists():
        raise InputError(f'no checkpoint at {place}: there is no such file or folder')
    return place
