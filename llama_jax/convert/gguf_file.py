"""The header of a GGUF file, read as if it were made to do harm: what it claims is checked against the file's size.

Layout (ggml's docs/gguf.md): magic, version, counts, key/values, tensor infos, padding, tensor data. The reader of the
library `gguf` trusts all of it; that library knows what the block-quantised types are, and is asked when one is met.
"""

import dataclasses
import functools
import math
import struct
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from etils import epath

from llama_jax.convert.tensors import ALL, BFLOAT16, FileTensor, Tensor, read_array
from llama_jax.errors import InputError
from llama_jax.storage import open_sparsely, read_range

DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_VERSIONS = (2, 3)
_MAX_NAME = 64  # bytes of a tensor's name
_MAX_KEY = 2**16 - 1
_MAX_VALUE = 64 << 20  # bytes of one value; the largest real ones, lists of merges, have a few MB
_MAX_AXES = 4
_MAX_METADATA = 128 << 20  # bytes of all keys and values; real files have a tenth of that
_MAX_TENSORS = 1 << 16  # the 405B's file has 1,138
_SCALARS = {
    0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: 'u1', 10: '<u8', 11: '<i8', 12: '<f8',
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MIN_KEY_VALUE = 8 + 4 + 1  # bytes: length of the key, type, value
_MIN_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes: length of the name, number of axes, one axis, type, offset


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How values are stored: `num_bytes` for each `size` consecutive values of a row."""

    number: int
    name: str
    size: int
    num_bytes: int


# What is no block: each value by itself.
F32, F16, BF16 = BlockType(0, 'F32', 1, 4), BlockType(1, 'F16', 1, 2), BlockType(30, 'BF16', 1, 2)
DTYPES = {F32: np.dtype('<f4'), F16: np.dtype('<f2'), BF16: BFLOAT16}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
      shape: outermost axis first, the reverse of the file's order.
      type: of its blocks, which lie along the innermost axis.
      offset: of the first byte, from the file's start.
    """

    shape: tuple[int, ...]
    type: BlockType
    offset: int

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) // self.type.size * self.type.num_bytes


Header: TypeAlias = tuple[dict[str, Any], dict[str, TensorInfo]]


def import_gguf() -> ModuleType:
    """The library that knows the block-quantised types, imported when one is met.

    Raises:
      InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            "quantised or written GGUF needs the package gguf: pip install 'llama_jax[gguf]'"
        ) from error
    return gguf


@functools.cache
def block_type(number: int) -> BlockType | None:
    """The type of this number, or None if the library does not know it or cannot turn it into float32."""
    for plain in DTYPES:
        if number == plain.number:
            return plain
    gguf = import_gguf()
    try:
        known = gguf.GGMLQuantizationType(number)
        size, num_bytes = gguf.GGML_QUANT_SIZES[known]
        gguf.quants.dequantize(np.zeros((1, num_bytes), np.uint8), known)
    except (ValueError, NotImplementedError):
        return None
    return BlockType(number, known.name, size, num_bytes)


class _Cursor:
    """Reads the header in order and never past the file's end."""

    def __init__(self, file: Any, origin: str, size: int):
        self.file, self.origin, self.size, self.position = file, origin, size, 0

    def error(self, problem: str) -> InputError:
        return InputError(f'{self.origin}: {problem}')

    def expect(self, count: int, what: str) -> None:
        """Refuses what needs at least `count` bytes more than there are, before any loop over it."""
        if count > self.size - self.position:
            raise self.error(
                f'{what} needs {count} bytes, but {self.size - self.position} are left of {self.size}; '
                'the file is damaged or was not copied whole'
            )

    def take(self, count: int, what: str) -> bytes:
        self.expect(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise self.error(f'it shrank while {what} was read')
        self.position += count
        return data

    def unpack(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack(f'<{layout}', self.take(struct.calcsize(f'<{layout}'), what))

    def text(self, what: str, limit: int = _MAX_VALUE) -> str:
        (length,) = self.unpack('Q', what)
        if length > limit:
            raise self.error(f'{what} is a string of {length} bytes; at most {limit} are read')
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.error(f'{what} is not UTF-8') from None


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """All key/values of the file: numbers, booleans, strings, NumPy arrays, and lists of strings.

    Raises:
      InputError: the file is no GGUF that can be read.
    """
    with open_sparsely(path, from_start=True) as file:
        return _metadata(_Cursor(file, str(path), path.stat().length))[0]


def read_header(path: epath.Path) -> Header:
    """All key/values, and each tensor by its name; they fill the file, each where the format places it.

    Raises:
      InputError: the file is no GGUF that can be read, or a tensor's type needs the library `gguf`.
    """
    with open_sparsely(path, from_start=True) as file:
        cursor = _Cursor(file, str(path), path.stat().length)
        metadata, num_tensors = _metadata(cursor)
        cursor.expect(num_tensors * _MIN_TENSOR, f'a list of {num_tensors} tensors')
        if num_tensors > _MAX_TENSORS:
            raise cursor.error(f'it lists {num_tensors} tensors; at most {_MAX_TENSORS} are read')
        tensors: dict[str, TensorInfo] = {}
        for index in range(num_tensors):
            name = cursor.text(f'the name of tensor {index}', _MAX_NAME)
            if name in tensors or not name.isprintable():
                raise cursor.error(
                    f'tensor {name!r} {"appears twice" if name in tensors else "has no printable name"}'
                )
            tensors[name] = _tensor_info(cursor, name)
        alignment = metadata.get('general.alignment', DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise cursor.error(
                f'general.alignment is {str(alignment)[:40]!r}; it must be a power of two, at most {_MAX_ALIGNMENT}'
            )
        return metadata, _placed(path, cursor, tensors, alignment)


def _metadata(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """The key/values, and how many tensors follow."""
    magic = cursor.take(4, 'the magic')
    if magic != b'GGUF':
        raise cursor.error(f'it begins with {magic!r}, not b"GGUF"; it is no GGUF file')
    (version,) = cursor.unpack('I', 'the version')
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, 'little'), 'big') in _VERSIONS
        kind = 'big-endian' if swapped else f'of version {version}'
        raise cursor.error(f'the file is {kind}; GGUF 2 and 3, little-endian, are read: convert it again')
    num_tensors, num_keys = cursor.unpack('QQ', 'the header')
    cursor.expect(num_keys * _MIN_KEY_VALUE, f'a list of {num_keys} keys')
    metadata: dict[str, Any] = {}
    for index in range(num_keys):
        key = cursor.text(f'key {index}', _MAX_KEY)
        if key in metadata:
            raise cursor.error(f'key {key[:80]!r} appears twice')
        metadata[key] = _value(cursor, f'the value of {key[:80]!r}')
        if cursor.position > _MAX_METADATA:
            raise cursor.error(
                f'its keys and values take more than {_MAX_METADATA} bytes; no model needs that'
            )
    return metadata, num_tensors


def _value(cursor: _Cursor, what: str) -> Any:
    (kind,) = cursor.unpack('I', what)
    if kind == _STRING:
        return cursor.text(what)
    if kind != _ARRAY:
        return _numbers(cursor, kind, 1, what)[0].item()
    element, count = cursor.unpack('IQ', what)
    if element != _STRING:  # arrays of arrays are refused here: nothing is known to write them
        return _numbers(cursor, element, count, what)
    _check_size(cursor, 8 * count, what)
    return [cursor.text(what) for _ in range(count)]


def _numbers(cursor: _Cursor, kind: int, count: int, what: str) -> np.ndarray:
    if kind not in _SCALARS:
        raise cursor.error(f'{what} has type {kind}; numbers, strings and arrays of these are read')
    dtype = np.dtype(_SCALARS[kind])
    _check_size(cursor, count * dtype.itemsize, what)
    values = np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype)
    return values != 0 if kind == _BOOL else values


def _check_size(cursor: _Cursor, num_bytes: int, what: str) -> None:
    cursor.expect(num_bytes, what)
    if num_bytes > _MAX_VALUE:
        raise cursor.error(f'{what} has {num_bytes} bytes; at most {_MAX_VALUE} are read')


def _tensor_info(cursor: _Cursor, name: str) -> TensorInfo:
    """What the file says of a tensor, its offset still from the start of the data."""
    what = f'tensor {name}'
    (num_axes,) = cursor.unpack('I', what)
    if not 1 <= num_axes <= _MAX_AXES:
        raise cursor.error(f'{what} has {num_axes} axes; 1 to {_MAX_AXES} are allowed')
    *axes, number, offset = cursor.unpack(f'{num_axes}QIQ', what)
    shape = tuple(axes[::-1])
    kind = block_type(number)
    if kind is None:
        raise cursor.error(
            f'{what} has type {number}, which the installed gguf library cannot turn into float32'
        )
    if min(shape) < 1 or shape[-1] % kind.size:
        raise cursor.error(
            f'{what} has shape {shape}; rows of {kind.name} have a multiple of {kind.size} values'
        )
    return TensorInfo(shape, kind, offset)


def _placed(
    path: epath.Path, cursor: _Cursor, tensors: dict[str, TensorInfo], alignment: int
) -> dict[str, TensorInfo]:
    """The tensors with offsets from the file's start.

    As llama.cpp has it, each begins at the first multiple of the alignment behind the one before. Where something was
    inserted or cut out, a tensor would be read from other bytes than its own: what lies between is zeros, and nothing
    follows the last.
    """
    start = -(-cursor.position // alignment) * alignment
    if any(padding := cursor.file.read(min(start - cursor.position, alignment))):
        raise cursor.error(
            f'{len(padding)} bytes between its header and its tensors are not zero; it is damaged'
        )
    placed = {}
    end, before = start, 'the header'
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        info = dataclasses.replace(info, offset=start + info.offset)
        if info.offset % alignment:
            raise cursor.error(
                f'tensor {name} begins at byte {info.offset}, no multiple of the alignment {alignment}'
            )
        if info.offset < end:
            raise cursor.error(f'tensor {name} begins at byte {info.offset}, inside {before}')
        stop = info.offset + info.num_bytes
        if stop > cursor.size:
            raise cursor.error(
                f'tensor {name} ends at byte {stop}, the file at {cursor.size}; it is damaged or was not copied whole'
            )
        if info.offset - end >= alignment:
            raise cursor.error(
                f'tensor {name} begins at byte {info.offset}, but {before} ends at {end}; the file is damaged'
            )
        end, before = stop, f'tensor {name}'
        placed[name] = info
    if cursor.size - end >= alignment or any(read_range(path, end, cursor.size - end)):
        raise cursor.error(
            f'{before} ends at byte {end}, the file at {cursor.size}; what follows belongs to no tensor: it is damaged'
        )
    return placed


def open_tensor(path: epath.Path, info: TensorInfo) -> Tensor:
    """The tensor that lies there, to be read in pieces."""
    if info.type in DTYPES:
        return FileTensor(path, info.offset, info.shape, DTYPES[info.type])
    return QuantizedTensor(path, info)


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A matrix stored in blocks along its rows; a piece of it is read as float32, and only that piece.

    Attributes:
      path: the file. The header's reader has checked that it is long enough.
      info: where in it.
    """

    path: epath.Path
    info: TensorInfo
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.info.shape

    def read_blocks(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """The bytes [rows, blocks, bytes of one] of all blocks that hold some of these columns; a vector is one row."""
        kind, length = self.info.type, self.shape[-1]
        blocks_a_row = length // kind.size
        start, stop, _ = rows.indices(math.prod(self.shape[:-1]))
        first, last, _ = columns.indices(length)
        offset = self.info.offset + start * blocks_a_row * kind.num_bytes
        shape = (max(stop - start, 0), blocks_a_row, kind.num_bytes)
        blocks = read_array(self.path, offset, shape, np.dtype(np.uint8))
        return blocks[:, first // kind.size : -(-last // kind.size)]

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`; whole rows are unpacked."""
        gguf = import_gguf()
        if len(self.shape) == 1:
            rows, columns = ALL, rows
        size = self.info.type.size
        first, last, _ = columns.indices(self.shape[-1])
        blocks = self.read_blocks(rows, columns)
        if not blocks.size or first >= last:
            values = np.zeros((len(blocks), max(last - first, 0)), self.dtype)
        else:
            begin = first // size * size
            with np.errstate(all='ignore'):  # a scale may be infinite or not a number, as any weight may
                values = gguf.quants.dequantize(
                    np.ascontiguousarray(blocks).reshape(len(blocks), -1),
                    gguf.GGMLQuantizationType(self.info.type.number),
                )[:, first - begin : last - begin]
        return values if len(self.shape) > 1 else values[0]
