"""PyTorch's zip checkpoints without PyTorch: tensors stay in the file until a piece of one is read.

A `.pth` is a zip file of uncompressed entries: `PREFIX/data.pkl`, a pickle of the containers and of each tensor's
place, and one `PREFIX/data/KEY` a storage. Every length and place is checked against the file before it is used.
"""

import functools
import itertools
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from llama_jax.convert import torch_pickle
from llama_jax.convert.tensors import BFLOAT16, FileTensor, StridedTensor
from llama_jax.convert.torch_pickle import MAX_NAME, Storage, StorageType, Unreadable, are_sizes, show
from llama_jax.errors import InputError
from llama_jax.storage import open_sparsely

_MAX_PICKLE = 4 << 20  # bytes; the 405B's takes 0.3 MB a file, and what it describes is held in memory
_MAX_DIRECTORY = 4 << 20  # bytes; the 405B's takes 0.1 MB a file
_WEIGHT_DTYPES = (np.dtype('<f2'), BFLOAT16, np.dtype('<f4'), np.dtype('<f8'))


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
        except (
            LookupError,
            TypeError,
            ValueError,
            struct.error,
            OverflowError,
            MemoryError,
            RecursionError,
        ) as error:
            raise InputError(f'{path} is damaged: its pickle is not valid ({show(str(error), 80)})') from None


def weights(state: Any, origin: str, ignored: Sequence[str] = ()) -> dict[str, FileTensor | StridedTensor]:
    """The tensors of a state dict, each one sound: floating-point values inside one storage of its file.

    Several may be views of one storage, as tied weights are.

    Args:
      state: what should be a dict from names to tensors.
      origin: the file, for messages.
      ignored: patterns of whole names that are left out.

    Raises:
      InputError: it is no such dict, or a tensor is not sound; it is named.
    """
    if not isinstance(state, dict) or not state:
        raise InputError(f'{origin} holds no state dict, that is tensors by name')
    found: dict[str, FileTensor | StridedTensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not re.fullmatch(r'[\w.\-]{1,200}', name, re.ASCII):
            raise InputError(f'{origin} has {show(name)} where the name of a tensor belongs')
        if any(re.fullmatch(pattern, name) for pattern in ignored):
            continue
        if isinstance(tensor, Unreadable):
            raise InputError(f'{origin}: tensor {name} {tensor.reason}')
        if not isinstance(tensor, FileTensor | StridedTensor):
            raise InputError(f'{origin}: {name} is a {type(tensor).__name__}, not a tensor')
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise InputError(
                f'{origin}: tensor {name} is of type {tensor.dtype}; weights are float16, bfloat16, float32 or float64'
            )
        if not math.prod(tensor.shape):
            raise InputError(f'{origin}: tensor {name} is empty: shape {tensor.shape}')
        found[name] = tensor
    return found


class _Bounded:
    """A file as `zipfile` is given it to find the directory: it may ask for no more than a directory takes."""

    def __init__(self, file: Any):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, _MAX_DIRECTORY + 1) if size >= 0 else _MAX_DIRECTORY + 1)
        if len(data) > _MAX_DIRECTORY:
            raise ValueError(f'its directory takes more than {_MAX_DIRECTORY} bytes')
        return data


class _Archive:
    """The entries of a zip file; each is checked when it is asked for.

    Values are read where they lie, so not through `zipfile`, and without their checksums. What says where they lie is
    therefore checked all the more: an entry's own header agrees with the directory, and it ends where the next begins.
    """

    def __init__(self, path: epath.Path, file: Any):
        self._path, self._file = path, file
        try:
            with zipfile.ZipFile(_Bounded(file)) as archive:  # pyright: ignore[reportArgumentType]
                entries, directory = archive.infolist(), archive.start_dir
        except (
            zipfile.BadZipFile,
            ValueError,
            NotImplementedError,
            OSError,
            OverflowError,
            struct.error,
        ) as error:
            raise InputError(
                f'{path} is not a complete zip file, as torch.save writes ({show(str(error), 80)}): it is cut off, '
                'damaged, or of another kind (files from before PyTorch 1.6 need saving again)'
            ) from None
        self._entries = {entry.orig_filename: entry for entry in entries}
        if len(self._entries) < len(entries):
            raise self._damaged('its zip directory gives one name to several entries')
        starts = sorted({entry.header_offset for entry in entries} | {directory})
        if starts[0] < 0:
            raise self._damaged('its zip directory points before its beginning')
        self._next = dict(itertools.pairwise(starts))
        pickles = [name for name in self._entries if re.fullmatch(r'[^/]+/data\.pkl', name)]
        if len(pickles) != 1:
            raise InputError(
                f'{path} is a zip file with {len(pickles)} entries */data.pkl; torch.save writes one'
            )
        self._prefix = pickles[0].removesuffix('data.pkl')
        self._places: dict[str, tuple[int, int] | InputError] = {}

    def small(self, name: str, default: bytes | None = None) -> bytes:
        """The content of a small entry."""
        if self._prefix + name not in self._entries and default is not None:
            return default
        offset, size = self.place(name)
        if size > _MAX_PICKLE:
            raise InputError(
                f'{self._path}: {name} has {size} bytes; a checkpoint needs at most {_MAX_PICKLE}'
            )
        content = self._read(offset, size)
        # PyTorch can be told to write no checksums; it writes 0 then.
        if self._entries[self._prefix + name].CRC not in (0, zlib.crc32(content)):
            raise self._damaged(f'entry {show(name)} is not what was written (CRC-32)')
        return content

    def place(self, name: str) -> tuple[int, int]:
        """Offset and size of an entry's content in the file.

        Raises:
          InputError: it is not there, compressed, or not where it is said to be.
        """
        if name not in self._places:
            try:
                self._places[name] = self._find(name)
            except InputError as error:
                self._places[name] = error  # a pickle may ask for it a million times
        if isinstance(place := self._places[name], InputError):
            raise place
        return place

    def _find(self, name: str) -> tuple[int, int]:
        entry = self._entries.get(self._prefix + name)
        if entry is None:
            raise InputError(f'{self._path} has no entry {show(name)}')
        size = entry.file_size
        if entry.flag_bits & 1 or entry.compress_type or entry.compress_size != size:
            raise InputError(
                f'{self._path}: entry {show(name)} is compressed or encrypted; torch.save writes neither: save it again'
            )
        # PKWARE's APPNOTE, 4.3.7 and 4.3.9: a header; behind the content, where flag 8 is set, its checksum and sizes.
        header = struct.unpack('<4sHHHHHIIIHH', self._read(entry.header_offset, 30))
        signature, _, flags, method, _, _, crc, packed, unpacked, name_length, extra_length = header
        own_name = self._read(entry.header_offset + 30, name_length)
        offset = entry.header_offset + 30 + name_length + extra_length
        has_summary = bool(flags & 8)
        behind = max(self._next.get(entry.header_offset, 0) - offset - size, 0)
        # Of short and long sizes. One without its signature, which the format allows and nobody writes for PyTorch,
        # would be taken for one whose values begin four bytes later.
        summaries = [
            b'PK\7\x08' + struct.pack(layout, entry.CRC, size, size)
            for layout in ('<IQQ', '<III')
            if size < 2**32 or layout == '<IQQ'
        ]
        is_sound = (
            signature == b'PK\3\4'
            and (flags, method) == (entry.flag_bits, entry.compress_type)
            and own_name.decode('utf-8' if flags & 0x800 else 'cp437', 'replace') == entry.orig_filename
            and all(
                own in {said, 2**32 - 1} or (has_summary and not own)
                for own, said in ((crc, entry.CRC), (packed, size), (unpacked, size))
            )
            and offset + size <= self._next.get(entry.header_offset, 0)
            and self._read(offset + size, min(behind, 30)) in (summaries if has_summary else [b''])
        )
        if not is_sound:
            raise self._damaged(f'entry {show(name)} is not where its directory says, or cut off')
        return offset, size

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) < size:
            raise self._damaged('its zip directory points beyond its end')
        return data

    def _damaged(self, how: str) -> InputError:
        return InputError(f'{self._path} is damaged: {how}')

    def storage(self, saved_id: Any) -> Storage:
        """What a pickle's persistent id stands for; one that cannot be used says so where it is."""
        kind, dtype, key, _, count = saved_id
        unusable = functools.partial(Storage, self._path, 0, 0, None)
        if kind != 'storage' or not isinstance(dtype, StorageType):
            raise ValueError('not a storage')
        if not isinstance(key, str) or len(key) > MAX_NAME:
            raise ValueError(f'a storage without a name of at most {MAX_NAME} characters')
        try:
            offset, size = self.place(f'data/{key}')
        except InputError as error:
            return unusable(f'cannot be read: {error}')
        if dtype.dtype is None:
            return unusable(f'is in a {dtype.name}, not in float16, bfloat16, float32 or float64')
        if not are_sizes([count]) or count * dtype.dtype.itemsize > size:
            return unusable(
                f'needs a storage of {show(count)} values, but entry data/{show(key, 20)} has {size} bytes'
            )
        return Storage(self._path, offset, count, dtype.dtype)
