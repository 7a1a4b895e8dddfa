"""One safetensors file: read as tensors that stay on disk, written block by block.

The format: the length of a header (8 bytes, little-endian), the header (JSON: of each tensor its type, its shape and
where it lies), then the values in row-major order without gaps. Read and written here, and not by the `safetensors`
library, because that needs whole arrays in memory and knows neither buckets nor files that lie.
"""

import dataclasses
import functools
import json
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

import numpy as np
from etils import epath

from llama_jax.convert.tensors import BFLOAT16, FileTensor, row_blocks
from llama_jax.errors import InputError
from llama_jax.json_file import parse_object, show_json
from llama_jax.storage import open_sparsely, prefetch

DTYPES = {
    'F64': np.dtype('<f8'),
    'F32': np.dtype('<f4'),
    'F16': np.dtype('<f2'),
    'BF16': BFLOAT16,
    'I64': np.dtype('<i8'),
    'I32': np.dtype('<i4'),
    'I16': np.dtype('<i2'),
    'I8': np.dtype('i1'),
    'U64': np.dtype('<u8'),
    'U32': np.dtype('<u4'),
    'U16': np.dtype('<u2'),
    'U8': np.dtype('u1'),
    'BOOL': np.dtype(bool),
}
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_MAX_HEADER = 32 << 20  # bytes; a Llama's has less than one MB, and what it describes is held in memory
_MAX_NAME = 256  # characters; what a message can show
_MAX_RANK = 8
_WRITE_BYTES = 256 << 10  # at once; Linux takes two to five times as long for pieces of a megabyte and more


def open_safetensors(path: epath.Path) -> dict[str, FileTensor]:
    """Every tensor of a file by its name; only the header is read.

    Raises:
      InputError: the header is damaged, or does not describe exactly what the file holds.
    """
    size = path.stat().length
    with open_sparsely(path) as file:
        prefix = file.read(8)
        if prefix == b'version ':
            raise InputError(f'{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull')
        length = int.from_bytes(prefix, 'little')
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
            raise InputError(
                f'{path}: the header is said to take {length} bytes of a file of {size} (at most {_MAX_HEADER}); '
                'it is no safetensors file, or truncated'
            )
        header = parse_object(file.read(length), f'{path}: the header')
    header.pop('__metadata__', None)
    start = 8 + length
    tensors = {name: _tensor(path, name, entry, start, size) for name, entry in header.items()}
    _check_cover(path, tensors, start, size)
    return tensors


def _tensor(path: epath.Path, name: str, entry: object, start: int, size: int) -> FileTensor:
    """What one entry of the header describes, whose data starts at byte `start` of a file of `size`."""
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise InputError(
            f'{path}: {show_json(name)} is no name of a tensor (1 to {_MAX_NAME} printable characters)'
        )
    where = f'{path}: tensor {name}'
    if not isinstance(entry, dict):
        raise InputError(
            f'{where} is described by {show_json(entry)}, it must be dtype, shape and data_offsets'
        )
    kind, shape, offsets = (entry.get(key) for key in ('dtype', 'shape', 'data_offsets'))
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise InputError(
            f'{where} is stored as {show_json(kind)}; only {", ".join(DTYPES)} can be read: '
            'get a copy that is not quantised'
        )
    if not _is_list_of_sizes(shape) or len(shape) > _MAX_RANK:
        raise InputError(f'{where} has shape {show_json(shape)}, it must be at most {_MAX_RANK} sizes from 0')
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f'{where} has data_offsets {show_json(offsets)}, it must be [start, stop] from 0')
    if offsets[1] > size - start:
        raise InputError(
            f'{where} ends at byte {show_json(start + offsets[1])}, the file at {size}; '
            'it is truncated: copy or download it again'
        )
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise InputError(
            f'{where} takes {offsets[1] - offsets[0]} bytes, which {kind} of shape {show_json(shape)} does not'
        )
    return FileTensor(path, start + offsets[0], tuple(shape), dtype)


def _is_list_of_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_cover(path: epath.Path, tensors: dict[str, FileTensor], start: int, size: int) -> None:
    """Refuses what the format does not allow: tensors that overlap, or bytes that are none's."""
    end = start
    spans = sorted(
        (t.offset, t.offset + math.prod(t.shape) * t.dtype.itemsize, name) for name, t in tensors.items()
    )
    for begin, stop, name in [*spans, (size, size, '')]:
        if begin > end:
            raise InputError(f'{path}: bytes {end} to {begin} belong to no tensor; the file is damaged')
        if begin < end:
            raise InputError(f'{path}: tensor {name} overlaps another one; the file is damaged')
        end = stop


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
      name: in the file.
      shape: one or two sizes, none of them 0.
      dtype: one of `DTYPES`.
      read: the rows of a slice, in this dtype; called from several threads, each row once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[slice], np.ndarray]

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: epath.Path, entries: Sequence[Entry], progress: Callable[[int], None] = lambda _: None
) -> None:
    """Writes a file, with never more than a few blocks of 32 MiB in memory.

    Args:
      path: a local file, which must not be one that `entries` read.
      entries: in this order, but wider types first, so that every tensor is aligned.
      progress: called with the number of bytes written since the last call.
    """
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with path.open('wb') as file:
        file.write(_header(entries))
        for block in prefetch(_blocks(entries)):
            for start in range(0, block.nbytes, _WRITE_BYTES):
                file.write(block.data[start : start + _WRITE_BYTES])
            progress(block.nbytes)


def _header(entries: Sequence[Entry]) -> bytes:
    # Releases 4 of transformers refuse a file that does not say which framework wrote it.
    header: dict[str, object] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            'dtype': _KINDS[entry.dtype],
            'shape': list(entry.shape),
            'data_offsets': [begin, end],
        }
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    return len(text).to_bytes(8, 'little') + text


def _blocks(entries: Sequence[Entry]) -> Iterator[Callable[[], np.ndarray]]:
    for entry in entries:
        for rows in row_blocks(entry.shape, entry.dtype):
            yield functools.partial(_block, entry, rows)


def _block(entry: Entry, rows: slice) -> np.ndarray:
    """The rows' bytes, in memory: a file that is only mapped is read here, beside the writing of other blocks."""
    block = entry.read(rows)
    assert block.dtype == entry.dtype and block.shape == (rows.stop - rows.start, *entry.shape[1:]), (
        entry.name
    )
    data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    data[:: mmap.PAGESIZE].max()  # touches every page
    return data
