"""PyTorch's zip checkpoints without PyTorch: tensors stay in the file until a piece of one is read.

A `.pth` is a zip file of uncompressed entries: `PREFIX/data.pkl`, a pickle of the containers and of each tensor's
place, and one `PREFIX/data/KEY` a storage. Every length and place is checked against the file before it is used.
"""

import functools
import math
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from llama_jax.convert import torch_pickle
from llama_jax.convert.tensors import BFLOAT16, FileTensor
from llama_jax.convert.torch_pickle import Storage, StorageType, Unreadable, are_sizes, show
from llama_jax.storage import open_sparsely
from llama_jax.types import InputError

_MAX_PICKLE = 4 << 20  # bytes; the 405B's takes 0.3 MB a file, and what it describes is held in memory
_MAX_DIRECTORY = 16 << 20
_WEIGHT_DTYPES = (np.dtype('<f2'), BFLOAT16, np.dtype('<f4'))


def open_torch_file(path: epath.Path) -> Any:
    """What `torch.save` saved: dicts, lists, tuples, numbers and strings, with tensors that stay on disk.

    Args:
      path: a zip file, which PyTorch has written since version 1.6.

    Raises:
      InputError: it is damaged, or asks for anything but tensors in plain containers.
    """
    with open_sparsely(path) as file:
        archive = _Archive(path, file)
        order = archive.small('byteorder', b'little')
        if order != b'little':
            raise InputError(f'{path} has byte order {show(order)}; only little-endian files can be read')
        data = archive.small('data.pkl')
        try:
            return torch_pickle.load(data, archive.storage)
        except InputError as error:
            raise InputError(f'{path}: {error}') from None
        except (LookupError, TypeError, ValueError, struct.error) as error:
            raise InputError(f'{path} is damaged: its pickle is not valid ({show(str(error), 80)})') from None


def weights(state: Any, origin: str, ignored: Sequence[str] = ()) -> dict[str, FileTensor]:
    """The tensors of a state dict, each one sound: floating-point values inside its file that overlap no other's.

    Args:
      state: what should be a dict from names to tensors.
      origin: the file, for messages.
      ignored: patterns of whole names that are left out.

    Raises:
      InputError: it is no such dict, or a tensor is not sound; it is named.
    """
    if not isinstance(state, dict) or not state:
        raise InputError(f'{origin} holds no state dict, that is tensors by name')
    found: dict[str, FileTensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not re.fullmatch(r'[\w.\-]{1,200}', name, re.ASCII):
            raise InputError(f'{origin} has {show(name)} where the name of a tensor belongs')
        if any(re.fullmatch(pattern, name) for pattern in ignored):
            continue
        if isinstance(tensor, Unreadable):
            raise InputError(f'{origin}: tensor {name} {tensor.reason}')
        if not isinstance(tensor, FileTensor):
            raise InputError(f'{origin}: {name} is a {type(tensor).__name__}, not a tensor')
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise InputError(
                f'{origin}: tensor {name} is of type {tensor.dtype}; weights are float16, bfloat16 or float32'
            )
        if not math.prod(tensor.shape):
            raise InputError(f'{origin}: tensor {name} is empty: shape {tensor.shape}')
        found[name] = tensor
    last = ''
    for name in sorted(found, key=lambda name: _extent(found[name])):
        if last and _extent(found[name])[0] < _extent(found[last])[1]:
            tied = {name, last} == {'tok_embeddings.weight', 'output.weight'}
            if not (tied and _extent(found[name]) == _extent(found[last])):
                raise InputError(f'{origin}: tensors {last} and {name} overlap in the file')
        last = name
    return found


def _extent(tensor: FileTensor) -> tuple[int, int]:
    return tensor.offset, tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize


class _Archive:
    """The entries of a zip file; each is checked when it is asked for."""

    def __init__(self, path: epath.Path, file: Any):
        self._path, self._file = path, file
        self._length = path.stat().length
        self._entries = self._directory()
        pickles = [name for name in self._entries if re.fullmatch(r'[^/]+/data\.pkl', name)]
        if len(pickles) != 1:
            raise InputError(
                f'{path} is a zip file with {len(pickles)} entries */data.pkl; torch.save writes one'
            )
        self._prefix = pickles[0].removesuffix('data.pkl')

    def small(self, name: str, default: bytes | None = None) -> bytes:
        """The content of a small entry."""
        if self._prefix + name not in self._entries and default is not None:
            return default
        offset, size = self.place(name)
        if size > _MAX_PICKLE:
            raise InputError(
                f'{self._path}: {name} has {size} bytes; a checkpoint needs at most {_MAX_PICKLE}'
            )
        return self._read(offset, size)

    def place(self, name: str) -> tuple[int, int]:
        """Offset and size of an entry's content in the file.

        Raises:
          InputError: it is not there, compressed, or beyond the end of the file.
        """
        if self._prefix + name not in self._entries:
            raise InputError(f'{self._path} has no entry {show(name)}')
        flags, method, packed, size, header = self._entries[self._prefix + name]
        if flags & 1 or method or packed != size:
            raise InputError(
                f'{self._path}: entry {show(name)} is compressed or encrypted; torch.save writes neither: save it again'
            )
        signature, name_length, extra_length = struct.unpack('<4s22xHH', self._read(header, 30))
        offset = header + 30 + name_length + extra_length
        if signature != b'PK\3\4' or offset + size > self._length:
            raise self._damaged(f'entry {show(name)} is not where its directory says, or cut off')
        return offset, size

    def _directory(self) -> dict[str, tuple[int, int, int, int, int]]:
        """Flags, compression, packed size, size and header's offset by name; PKWARE's APPNOTE, 4.3.12 to 4.3.16."""
        start = max(self._length - 22 - 20, 0)
        tail = self._read(start, self._length - start)
        if tail[-22:-18] != b'PK\5\6':  # a comment stands behind it
            start = max(start - 65535, 0)
            tail = self._read(start, self._length - start)
        end = tail.rfind(b'PK\5\6', 0, max(len(tail) - 18, 0))
        if end < 0:
            raise InputError(
                f'{self._path} is not a complete zip file, as torch.save writes: it is cut off, or of another kind '
                '(files from before PyTorch 1.6 need saving again)'
            )
        size, offset = struct.unpack_from('<II', tail, end + 12)
        if end >= 20 and tail[end - 20 : end - 16] == b'PK\6\7':  # ZIP64
            record = self._read(struct.unpack_from('<Q', tail, end - 12)[0], 56)
            if record[:4] != b'PK\6\6':
                raise self._damaged('its zip directory is not where it says')
            size, offset = struct.unpack_from('<QQ', record, 40)
        if size > _MAX_DIRECTORY:
            raise InputError(f'{self._path} has a zip directory of {size} bytes; a checkpoint needs far less')
        directory = self._read(offset, size)
        entries: dict[str, tuple[int, int, int, int, int]] = {}
        at = 0
        while at < size:
            if size - at < 46 or directory[at : at + 4] != b'PK\1\2':
                raise self._damaged('its zip directory is not valid')
            flags, method, packed, content = struct.unpack_from('<HH8xII', directory, at + 8)
            name_length, extra_length, comment_length, place = struct.unpack_from(
                '<HHH8xI', directory, at + 28
            )
            name = directory[at + 46 : at + 46 + name_length].decode('utf-8', 'replace')
            at += 46 + name_length
            packed, content, header = self._long(directory[at : at + extra_length], packed, content, place)
            at += extra_length + comment_length
            if name in entries:
                raise self._damaged(f'its zip directory names {show(name)} twice')
            entries[name] = flags, method, packed, content, header
        return entries

    def _long(self, extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
        """Sizes and offset, from ZIP64's extra field where they do not fit into the directory's own."""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from('<HH', extra, at)
            if kind == 1:
                field = extra[at + 4 : at + 4 + length]
                values = iter(struct.unpack(f'<{len(field) // 8}Q', field[: len(field) // 8 * 8]))
                size, packed, header = (
                    next(values, value) if value == 2**32 - 1 else value for value in (size, packed, header)
                )
            at += 4 + length
        return packed, size, header

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size > self._length:
            raise self._damaged('its zip directory points beyond its end')
        self._file.seek(offset)
        return self._file.read(size)

    def _damaged(self, how: str) -> InputError:
        return InputError(f'{self._path} is damaged: {how}')

    def storage(self, saved_id: Any) -> Storage:
        """What a pickle's persistent id stands for; one that cannot be used says so where it is."""
        kind, dtype, key, _, count = saved_id
        unusable = functools.partial(Storage, self._path, 0, 0, None)
        if kind != 'storage' or not isinstance(dtype, StorageType) or not isinstance(key, str):
            raise ValueError('not a storage')
        try:
            offset, size = self.place(f'data/{key}')
        except InputError as error:
            return unusable(f'cannot be read: {error}')
        if dtype.dtype is None:
            return unusable(f'is in a {dtype.name}, not in float16, bfloat16 or float32')
        if not are_sizes([count]) or count * dtype.dtype.itemsize > size:
            return unusable(
                f'needs a storage of {show(count)} values, but entry data/{show(key, 20)} has {size} bytes'
            )
        return Storage(self._path, offset, count, dtype.dtype)
