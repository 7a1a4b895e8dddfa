"""Packed rows on disk, as training reads them: ArrayRecord shards and their manifest, which `shards` wrote.

Format 2 has a shard for each unit, packed by itself. In format 1, which is read and no longer written, a row may go on
from one shard to the next.
"""

import bisect
import contextlib
import errno
import functools
import hashlib
import itertools
import os
import resource
from typing import Any, SupportsIndex

import numpy as np
from etils import epath

from llama_jax.data.packing import Row, count_rows, pad_row
from llama_jax.errors import InputError, error_line
from llama_jax.json_file import read_object
from llama_jax.storage import enable_bucket

MANIFEST = 'manifest.json'
FORMAT = 'llama_jax packed rows 2'
_FORMAT_1 = 'llama_jax packed rows 1'
VALIDATION = 'validation'  # the folder, in that of a source, of what is held out of it
_KEYS = {
    'seq_len': int,
    'vocab_size': int,
    'dtype': str,
    'num_rows': int,
    'num_documents': int,
    'num_tokens': int,
    'num_bytes': int,
    'fingerprint': str,
    'tokenizer_sha256': str,
    'shards': list,
}
_SHARD_KEYS = {'file': str, 'rows': int, 'bytes': int, 'sha256': str}
_READING, _FILTERS = ('text_key', 'separator'), ('bad', 'empty', 'held_out')
_UNIT_KEYS = {'documents': int, 'tokens': int, 'text_bytes': int, 'fingerprint': str}


def is_prepared(source: str) -> bool:
    """Whether `source` is a folder of prepared rows that is finished."""
    if not source or source.startswith(('tfds:', 'python_stdlib')):
        return False
    enable_bucket(source)
    return (epath.Path(source) / MANIFEST).exists()


def _max_open_shards() -> int:
    """Half of the descriptors that the process may have, for which it takes all that it can get.

    An open shard holds one, and 13 bytes a row; to open it takes 4 ms.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(limit // 2, 1) if 0 <= limit < 1 << 15 else 1 << 14


# Of all folders together; a reader that a thread still uses is closed when it is done.
@functools.lru_cache(_max_open_shards())
def _open_shard(file: str, sha256: str) -> Any:
    del sha256  # tells apart what has stood under one name
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(
        file, options='readahead_buffer_size:0', file_reader_buffer_size=1 << 15
    )


class PreparedRows:
    """Rows of a folder; the same contract, and the same rows, as `packing.PackedRows`.

    Attributes:
      tokenizer_sha256: hash of the tokenizer file that made the tokens.
      vocab_size: of that tokenizer.
      in_units: whether it is of format 2.
      folder: that was opened.
      ends: of each shard, the number of the row behind its last.
      manifest: what the folder says of itself.
    """

    def __init__(self, directory: str | os.PathLike, seq_len: int | None = None):
        """Opens a folder and checks its files against the manifest: presence and size, not content.

        Args:
          directory: prepared, and finished.
          seq_len: T wanted; rows are cut into whole parts, so it must divide the folder's own, which is the
            default.

        Raises:
          InputError: no manifest, or a broken one; a shard is missing or cut short; seq_len does not divide.
        """
        enable_bucket(directory)
        self.folder = epath.Path(directory)
        manifest = _read_manifest(self.folder)
        stored = manifest['seq_len']
        self.seq_len = stored if seq_len is None else seq_len
        if self.seq_len > stored:
            raise InputError(
                f'seq_len {seq_len} is longer than the rows of {directory}, {stored}: '
                f'prepare it again with seq_len {seq_len}, or train with {stored} or less'
            )
        if self.seq_len < 1 or stored % self.seq_len:
            raise InputError(
                f'seq_len {seq_len} does not divide the rows of {directory}, {stored}; use a divisor'
            )
        self._parts, self._stored = stored // self.seq_len, stored
        self._dtype = np.dtype(manifest['dtype']).newbyteorder('<')
        self.fingerprint = manifest['fingerprint']
        self.num_documents = manifest['num_documents']
        self.num_tokens = manifest['num_tokens']
        self.num_bytes = manifest['num_bytes']
        self.tokenizer_sha256 = manifest['tokenizer_sha256']
        self.vocab_size = manifest['vocab_size']
        self.manifest = manifest
        self.in_units = manifest['format'] == FORMAT
        self._shards = manifest['shards']
        sizes = _list_sizes(self.folder, os.path.commonprefix([shard['file'] for shard in self._shards]))
        for shard in self._shards:
            file = self.folder / shard['file']
            if shard['file'] not in sizes:
                raise InputError(f'{file} is missing; copy {directory} again or prepare it again')
            if sizes[shard['file']] != shard['bytes']:
                raise InputError(
                    f'{file} has {sizes[shard["file"]]} bytes where its manifest says {shard["bytes"]}; '
                    'it is cut short or changed: copy or prepare it again'
                )
        if self.in_units:
            rows = [count_rows(shard['tokens'], self.seq_len) for shard in self._shards]
        else:  # one stream: its last row alone may be shorter
            rows = [shard['rows'] * self._parts for shard in self._shards]
            rows[-1] += count_rows(self.num_tokens, self.seq_len) - sum(rows)
        self.ends = list(itertools.accumulate(rows))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Row:
        number = range(len(self))[index]
        shard, row_of_shard = self.find(number)
        stored, part = divmod(row_of_shard, self._parts)
        record = self._read(shard, stored, number)
        width = (self._stored + 1) * self._dtype.itemsize
        if len(record) != width + (self._stored + 1) * 4:
            raise InputError(f'row {number} of {self.folder} has {len(record)} bytes; prepare it again')
        cut = slice(part * self.seq_len, (part + 1) * self.seq_len + 1)
        tokens = np.frombuffer(record[:width], self._dtype)[cut]
        segment_ids = np.frombuffer(record[width:], '<u4')[cut].astype(np.int32)
        offset = segment_ids[0] - 1
        return pad_row(tokens, np.where(segment_ids > 0, segment_ids - offset, 0), self.seq_len)

    def find(self, number: int) -> tuple[int, int]:
        """(shard, row in it) of a row."""
        shard = bisect.bisect_right(self.ends, number)
        return shard, number - (self.ends[shard - 1] if shard else 0)

    def _read(self, place: int, stored: int, number: int) -> bytes:
        """A record of a shard; `number` is that of the row, for messages."""
        shard = self._shards[place]
        file = os.fspath(self.folder / shard['file'])
        try:
            return _open_shard(file, shard['sha256']).read([stored])[0]
        except (RuntimeError, IndexError) as error:
            _open_shard.cache_clear()  # a reader that failed would fail for ever
            reason = error_line(error)
            if os.strerror(errno.EMFILE) in reason:
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                raise InputError(
                    f'{file} cannot be opened: the process has as many files open as it may have, {limit}; '
                    'raise that limit (ulimit -n)'
                ) from error
            of_system = any(words in reason for words in (' failed: ', ', with a last message of '))
            if of_system and 'Corrupted' not in reason:  # of the file nothing is known
                raise InputError(f'{file} cannot be read at row {number}: {reason}') from error
            raise InputError(
                f'{file} is damaged at row {number} ({reason}); copy or prepare it again'
            ) from error

    def verify(self) -> None:
        """Compares every file of the folder with its hash; raises InputError naming the first that differs."""
        for shard in self._shards:
            files = [(shard['file'], shard['sha256'])]
            if 'documents_sha256' in shard:
                files.append((origins_file(shard['file']), shard['documents_sha256']))
            for name, sha256 in files:
                file = self.folder / name
                if sha256_of(file) != sha256:
                    raise InputError(
                        f'{file} differs from what was written (sha256); copy or prepare it again'
                    )


def _list_sizes(folder: epath.Path, prefix: str) -> dict[str, int]:
    """Bytes of the files of a folder whose names begin so, by one listing."""
    if '://' not in os.fspath(folder):
        with os.scandir(folder) as found:
            return {file.name: file.stat().st_size for file in found if file.is_file()}
    import fsspec

    system, name = fsspec.core.url_to_fs(os.fspath(folder))
    found = system.find(name, detail=True, prefix=prefix)
    return {file['name'].rpartition('/')[2]: file['size'] for file in found.values()}


def _read_manifest(folder: epath.Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = read_object(file)
    except InputError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise InputError(
            f'{folder} has no {MANIFEST}: nothing was prepared there, or it was cut off'
        ) from error
    if manifest.get('format') not in (FORMAT, _FORMAT_1):
        raise InputError(f'{file} is not a manifest of {FORMAT!r}; prepare it again')
    in_units = manifest['format'] == FORMAT
    wrong = [key for key, kind in _KEYS.items() if not isinstance(manifest.get(key), kind)]
    if not wrong:
        seq_len, shards = max(manifest['seq_len'], 1), manifest['shards']
        described = all(_is_shard(shard, in_units) for shard in shards)
        if in_units and described:
            described = all(shard['rows'] == count_rows(shard['tokens'], seq_len) for shard in shards)
            described = described and sum(shard['tokens'] for shard in shards) == manifest['num_tokens']
        num_rows = sum(shard['rows'] for shard in shards) if described else 0
        if not in_units:
            num_rows = count_rows(manifest['num_tokens'], seq_len)
        is_right = {
            'seq_len': 0 < manifest['seq_len'] < 2**31,
            'vocab_size': 0 < manifest['vocab_size'] < 2**31,
            'dtype': manifest['dtype'] in ('uint16', 'uint32'),
            'shards': described and sum(shard['rows'] for shard in shards) == num_rows,
            'num_rows': not described or manifest['num_rows'] == num_rows > 0,
        }
        wrong = [key for key, right in is_right.items() if not right] + _spoiled_origins(manifest)
    if wrong:
        raise InputError(f'{file} lacks or spoils {", ".join(wrong)}; copy or prepare it again')
    return manifest


def _spoiled_origins(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with what a manifest tells of where its documents are from; some do not tell."""
    if not (files := manifest.get('files')):
        return []
    source, filters = manifest.get('source'), manifest.get('filters')
    reading = source.get('reading') if isinstance(source, dict) else None
    is_right = {
        'files': isinstance(files, list)
        and all(isinstance(file, dict) and isinstance(file.get('name'), str) for file in files),
        'source': isinstance(reading, dict)
        and all(type(reading.get(name)) is str for name in _READING)
        and len(reading) == len(_READING),
        'filters': isinstance(filters, dict) and all(type(filters.get(name)) is int for name in _FILTERS),
        **{name: isinstance(manifest.get(name, []), list) for name in ('bad_first', 'empty_first')},
    }
    return [key for key, right in is_right.items() if not right]


def _is_shard(shard: object, in_units: bool) -> bool:
    """Whether an entry describes a file of the folder itself."""
    if not isinstance(shard, dict):
        return False
    kinds = _SHARD_KEYS | (_UNIT_KEYS if in_units else {})
    is_typed = all(isinstance(shard.get(key), kind) for key, kind in kinds.items())
    is_typed = is_typed and isinstance(shard.get('documents_sha256', ''), str)
    return is_typed and '/' not in shard['file'] and min(shard['rows'], shard['bytes']) >= 0


def origins_file(shard: str) -> str:
    """'rows-00003.array_record' -> the name of the file that tells where its documents came from."""
    return shard.removesuffix('.array_record').replace('rows-', 'documents-') + '.npy.zst'


def sha256_of(file: epath.Path) -> str:
    """Of a file's content.

    Raises:
      InputError: it is not there.
    """
    digest = hashlib.sha256()
    try:
        with file.open('rb') as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    except FileNotFoundError as error:
        raise InputError(f'{file} is missing; copy or prepare it again') from error
    return digest.hexdigest()
