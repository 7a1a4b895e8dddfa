"""PyTorch's zip checkpoints written as a stream: a block of values is hashed, written and forgotten.

Sizes are known beforehand and checksums stand behind the values (a data descriptor, as `torch.save` writes it), so
nothing is ever written twice, and the MD5 of the file is known when its last byte is.
"""

import hashlib
import math
import struct
import zlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from etils import epath

from llama_jax.convert import torch_pickle

_ZIP32_LIMIT = 2**32 - 1  # sizes and offsets from here on stand in ZIP64's fields
_ALIGNMENT = 64  # of values, so that a file can be mapped
_MAX_UNHASHED = 32 << 20  # bytes that wait in memory: one block is hashed while the next is made
_WRITE_BYTES = 256 << 10  # at once; Linux takes longer for the same bytes in pieces of a megabyte and more
_DATE = 0x21  # 1 January 1980, the first that a zip file can tell


class TorchWriter:
    """One file that `torch.load(weights_only=True, mmap=True)` reads, given its tensors in order and in pieces.

    Use it in a `with` statement, which closes the file; only what was finished is complete.
    """

    def __init__(
        self,
        path: epath.Path,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        same: Mapping[str, str] | None = None,
    ):
        """Starts the file.

        Args:
          path: a local file, which is replaced.
          tensors: shape and type by name, in the order of their values.
          same: tensors that are another, earlier one, by name; their values are not given, but shared in the file.
        """
        same = same or {}
        stored = [name for name in tensors if name not in same]
        keys = {name: str(index) for index, name in enumerate(stored)}
        keys |= {name: keys[other] for name, other in same.items()}
        self._waiting = [
            (f'archive/data/{keys[name]}', math.prod(tensors[name][0]) * tensors[name][1].itemsize)
            for name in stored
        ][::-1]
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._hashing = ThreadPoolExecutor(1)  # MD5 is the slowest part; it needs no lock of Python's
        self._hashed: deque[tuple[Future[None], int]] = deque()
        self._file = open(path, 'wb', buffering=0)  # noqa: SIM115
        self._offset = self._crc = self._left = 0
        self._directory: list[bytes] = []
        self._add('archive/data.pkl', torch_pickle.dump(tensors, keys))
        self._add('archive/byteorder', b'little')

    def __enter__(self) -> 'TorchWriter':
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._hashing.shutdown(cancel_futures=True)

    def append(self, block: np.ndarray) -> None:
        """The next values: rows of the tensor begun, or the first ones of the next."""
        if not self._left:
            name, size = self._waiting.pop()
            self._begin(name, size)
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        assert len(data) <= self._left, f'{len(data)} bytes where {self._left} are left'
        self._write_content(data)
        if not self._left:
            self._end()

    def finish(self) -> str:
        """Completes the file; its MD5 in hexadecimal."""
        assert not self._waiting and not self._left, f'{len(self._waiting)} tensors are missing'
        self._add('archive/version', b'3\n')
        directory, start = b''.join(self._directory), self._offset
        self._write(directory)
        count = len(self._directory)
        long = max(start, len(directory)) >= _ZIP32_LIMIT or count >= 0xFFFF
        if long:
            end = self._offset
            self._write(
                struct.pack('<4sQHHIIQQQQ', b'PK\6\6', 44, 45, 45, 0, 0, count, count, len(directory), start)
                + struct.pack('<4sIQI', b'PK\6\7', 0, end, 1)
            )
        short = (0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1) if long else (count, count, len(directory), start)
        self._write(struct.pack('<4sHHHHIIH', b'PK\5\6', 0, 0, *short, 0))
        self._wait_for_hashing(0)
        return self._md5.hexdigest()

    def _add(self, name: str, content: bytes) -> None:
        self._begin(name, len(content))
        self._write_content(memoryview(content))
        self._end()

    def _begin(self, name: str, size: int) -> None:
        """The header of an entry, padded so that its content is aligned; PKWARE's APPNOTE, 4.3.7."""
        self._entry = name.encode(), size, self._offset
        long = struct.pack('<HHQQ', 1, 16, 0, 0) if size >= _ZIP32_LIMIT else b''
        short = 2**32 - 1 if long else 0
        unpadded = self._offset + 30 + len(name) + len(long) + 4
        padding = struct.pack('<2sH', b'FB', -unpadded % _ALIGNMENT) + b'Z' * (-unpadded % _ALIGNMENT)
        sizes = short, short, len(name), len(long) + len(padding)
        header = struct.pack('<4sHHHHHIIIHH', b'PK\3\4', 45 if long else 20, 8, 0, 0, _DATE, 0, *sizes)
        self._write(header + name.encode() + long + padding)
        self._left, self._crc = size, 0

    def _write_content(self, data: memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._left -= len(data)
        self._write(data)

    def _end(self) -> None:
        """The checksum behind an entry's content, and its line of the directory."""
        name, size, start = self._entry
        self._write(
            struct.pack('<4sIQQ' if size >= _ZIP32_LIMIT else '<4sIII', b'PK\7\x08', self._crc, size, size)
        )
        numbers = [size, size, start]
        long = b''.join(struct.pack('<Q', number) for number in numbers if number >= _ZIP32_LIMIT)
        extra = struct.pack('<HH', 1, len(long)) + long if long else b''
        short = [2**32 - 1 if number >= _ZIP32_LIMIT else number for number in numbers]
        version = 45 if long else 20
        self._directory.append(
            struct.pack('<4sHHHHHHIII', b'PK\1\2', version, version, 8, 0, 0, _DATE, self._crc, *short[:2])
            + struct.pack('<HHHHHII', len(name), len(extra), 0, 0, 0, 0, short[2])
            + name
            + extra
        )

    def _write(self, data: bytes | memoryview) -> None:
        """Written here, hashed beside it."""
        self._hashed.append((self._hashing.submit(self._md5.update, data), len(data)))
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view[:_WRITE_BYTES]) :]
        self._offset += len(data)
        self._wait_for_hashing(_MAX_UNHASHED)

    def _wait_for_hashing(self, allowed: int) -> None:
        while self._hashed and sum(size for _, size in self._hashed) > allowed:
            self._hashed.popleft()[0].result()
