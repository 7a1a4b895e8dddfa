"""Packed rows on disk: ArrayRecord shards and a manifest that is written last.

A record is the row's tokens in the manifest's dtype, then its segment ids as uint32. The manifest makes the
folder readable, so a run that was cut off leaves nothing that passes for data.
"""

import bisect
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import resource
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

import numpy as np
from etils import epath

from llama_jax.data.packing import Progress, Row, StreamFingerprint, pad_row, token_dtype, tokenized_chunks
from llama_jax.json_file import read_object
from llama_jax.storage import enable_bucket, new_folder, system_failures, write_atomically
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import InputError, SystemFailure, error_line

MANIFEST = 'manifest.json'
_FORMAT = 'llama_jax packed rows 1'
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


def is_prepared(source: str) -> bool:
    """Whether `source` is a folder that `write_prepared` finished."""
    if not source or source.startswith(('tfds:', 'python_stdlib')):
        return False
    enable_bucket(source)
    return (epath.Path(source) / MANIFEST).exists()


def write_prepared(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    seq_len: int,
    directory: str | os.PathLike,
    *,
    rows_per_shard: int = 1 << 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenises, packs and writes documents as they come; memory does not grow with the corpus.

    Args:
      documents: texts, read once.
      tokenizer: gives the ids.
      seq_len: T; a row has T + 1 tokens.
      directory: made where missing; it appears whole, and in a bucket is whole when its manifest is there.
      rows_per_shard: rows in each file but the last.
      progress: called after each batch.

    Returns:
      The manifest.

    Raises:
      InputError: there is something in the directory already, or there are fewer than 2 tokens.
      SystemFailure: the disk is full, or broken.
    """
    from array_record.python import array_record_module

    enable_bucket(directory)
    folder = epath.Path(directory)
    if seq_len < 1:
        raise InputError(f'seq_len is {seq_len}; it must be 1 or more')
    if (folder / MANIFEST).exists():
        raise InputError(f'{directory} already holds prepared data; delete it or write elsewhere')
    totals = {'num_rows': 0, 'num_documents': 0, 'num_tokens': 0, 'num_bytes': 0}
    fingerprint = StreamFingerprint()
    shards: list[dict[str, Any]] = []
    writer = None
    dtype = token_dtype(tokenizer)
    with contextlib.ExitStack() as at_exit:
        in_bucket = '://' in os.fspath(folder)
        if in_bucket:  # ArrayRecord reads them and does not write to them
            local = epath.Path(at_exit.enter_context(tempfile.TemporaryDirectory()))
        else:
            local = at_exit.enter_context(new_folder(folder))

        def finish(shard: dict[str, Any]) -> None:
            nonlocal writer
            assert writer is not None
            writer.close()
            writer = None
            file = local / shard['file']
            with system_failures(f'{folder / file.name} cannot be written'):
                shard |= {'bytes': file.stat().length, 'sha256': _sha256(file)}
                if in_bucket:
                    file.copy(folder / file.name, overwrite=True)
                    file.unlink()

        try:
            for row in _stream_rows(documents, tokenizer, seq_len, totals, fingerprint, progress):
                if writer is None:
                    file = local / f'rows-{len(shards):05d}.array_record'
                    writer = array_record_module.ArrayRecordWriter(os.fspath(file), 'group_size:1,zstd:1')
                    shards.append({'file': file.name, 'rows': 0})
                writer.write(
                    row['tokens'].astype(dtype).tobytes() + row['segment_ids'].astype('<u4').tobytes()
                )
                totals['num_rows'] += 1
                shards[-1]['rows'] += 1
                if shards[-1]['rows'] == rows_per_shard:
                    finish(shards[-1])
            if writer is not None:
                finish(shards[-1])
        except RuntimeError as error:
            if '() failed: ' not in str(error):  # how ArrayRecord tells what the system has refused
                raise
            raise SystemFailure(f'{folder} cannot be written: {error_line(error)}') from error
        finally:
            if writer is not None:
                with contextlib.suppress(RuntimeError):  # it was told
                    writer.close()
        if not shards:
            raise InputError(
                f'the corpus has {totals["num_tokens"]} tokens; 2 are the least to train on: give more text'
            )
        manifest = {
            'format': _FORMAT,
            'seq_len': seq_len,
            'vocab_size': tokenizer.vocab_size,
            'dtype': dtype.name,
            **totals,
            'fingerprint': fingerprint.hexdigest(),
            'tokenizer_sha256': tokenizer.sha256,
            'shards': shards,
        }
        place = folder if in_bucket else local
        for stale in place.glob('rows-*.array_record'):  # of a run that was cut off
            if stale.name not in {shard['file'] for shard in shards}:
                stale.unlink()
        write_atomically(place / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _stream_rows(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    seq_len: int,
    totals: dict[str, int],
    fingerprint: StreamFingerprint,
    progress: Progress | None,
) -> Iterator[Row]:
    """The rows of `PackedRows`, one after another; adds to `totals` and `fingerprint` on the way."""
    tokens = np.zeros(0, token_dtype(tokenizer))  # not yet in a row, or shared with the next one
    numbers = np.zeros(0, np.int64)  # of the documents that they belong to
    for chunk in tokenized_chunks(documents, tokenizer, progress):
        fingerprint.update(chunk.tokens, chunk.starts + totals['num_tokens'])
        is_start = np.zeros(len(chunk.tokens), np.int64)
        is_start[chunk.starts] = 1
        tokens = np.concatenate([tokens, chunk.tokens])
        numbers = np.concatenate([numbers, totals['num_documents'] + np.cumsum(is_start)])
        totals['num_documents'] += len(chunk.starts)
        totals['num_tokens'] += len(chunk.tokens)
        totals['num_bytes'] += chunk.num_bytes
        begin = 0
        while begin + seq_len < len(tokens):
            row = slice(begin, begin + seq_len + 1)
            yield pad_row(tokens[row], 1 + numbers[row] - numbers[begin], seq_len)
            begin += seq_len
        tokens, numbers = tokens[begin:], numbers[begin:]
    if len(tokens) > 1:
        yield pad_row(tokens, 1 + numbers - numbers[0], seq_len)


def _max_open_shards() -> int:
    """A quarter of the descriptors that the process may have; an open shard holds one, and some 0.8 MB."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(limit // 4, 1) if 0 <= limit < 4096 else 1024


# Of all folders together; a reader that a thread still uses is closed when it is done.
@functools.lru_cache(_max_open_shards())
def _open_shard(file: str, sha256: str) -> Any:
    del sha256  # tells apart what has stood under one name
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(
        file, options='readahead_buffer_size:0', file_reader_buffer_size=1 << 15
    )


class PreparedRows:
    """Rows that `write_prepared` wrote; the same contract, and the same rows, as `packing.PackedRows`.

    Attributes:
      tokenizer_sha256: hash of the tokenizer file that made the tokens.
      vocab_size: of that tokenizer.
    """

    def __init__(self, directory: str | os.PathLike, seq_len: int | None = None):
        """Opens a folder and checks its files against the manifest: presence and size, not content.

        Args:
          directory: what `write_prepared` wrote.
          seq_len: T wanted; rows are cut into whole parts, so it must divide the folder's own, which is the
            default.

        Raises:
          InputError: no manifest, or a broken one; a shard is missing or cut short; seq_len does not divide.
        """
        enable_bucket(directory)
        self._folder = epath.Path(directory)
        manifest = _read_manifest(self._folder)
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
        self._shards = manifest['shards']
        for shard in self._shards:
            file = self._folder / shard['file']
            if not file.exists():
                raise InputError(f'{file} is missing; copy {directory} again or prepare it again')
            if file.stat().length != shard['bytes']:
                raise InputError(
                    f'{file} has {file.stat().length} bytes where its manifest says {shard["bytes"]}; '
                    'it is cut short or changed: copy or prepare it again'
                )
        self._ends = list(itertools.accumulate(shard['rows'] for shard in self._shards))

    def __len__(self) -> int:
        return -(-(self.num_tokens - 1) // self.seq_len)

    def __getitem__(self, index: SupportsIndex) -> Row:
        number, part = divmod(range(len(self))[index], self._parts)
        record = self._read(number)
        width = (self._stored + 1) * self._dtype.itemsize
        if len(record) != width + (self._stored + 1) * 4:
            raise InputError(f'row {number} of {self._folder} has {len(record)} bytes; prepare it again')
        cut = slice(part * self.seq_len, (part + 1) * self.seq_len + 1)
        tokens = np.frombuffer(record[:width], self._dtype)[cut]
        segment_ids = np.frombuffer(record[width:], '<u4')[cut].astype(np.int32)
        offset = segment_ids[0] - 1
        return pad_row(tokens, np.where(segment_ids > 0, segment_ids - offset, 0), self.seq_len)

    def _read(self, number: int) -> bytes:
        """The record of a stored row."""
        place = bisect.bisect_right(self._ends, number)
        shard = self._shards[place]
        file = os.fspath(self._folder / shard['file'])
        try:
            return _open_shard(file, shard['sha256']).read([number - self._ends[place] + shard['rows']])[0]
        except (RuntimeError, IndexError) as error:
            _open_shard.cache_clear()  # a reader that failed would fail for ever
            reason = error_line(error)
            if os.strerror(errno.EMFILE) in reason:
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                raise InputError(
                    f'{file} cannot be opened: the process has as many files open as it may have, {limit}; '
                    'raise that limit (ulimit -n)'
                ) from error
            if (
                ' failed: ' in reason and 'Corrupted' not in reason
            ):  # of the system: of the file nothing is known
                raise InputError(f'{file} cannot be read at row {number}: {reason}') from error
            raise InputError(
                f'{file} is damaged at row {number} ({reason}); copy or prepare it again'
            ) from error

    def verify(self) -> None:
        """Compares every shard with its hash; raises InputError naming the first that differs."""
        for shard in self._shards:
            file = self._folder / shard['file']
            if _sha256(file) != shard['sha256']:
                raise InputError(f'{file} differs from what was written (sha256); copy or prepare it again')


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
    if manifest.get('format') != _FORMAT:
        raise InputError(f'{file} is not a manifest of {_FORMAT!r}; prepare it again')
    wrong = [key for key, kind in _KEYS.items() if not isinstance(manifest.get(key), kind)]
    if not wrong:
        num_rows = -(-(manifest['num_tokens'] - 1) // max(manifest['seq_len'], 1))
        is_right = {
            'seq_len': 0 < manifest['seq_len'] < 2**31,
            'vocab_size': 0 < manifest['vocab_size'] < 2**31,
            'dtype': manifest['dtype'] in ('uint16', 'uint32'),
            'num_rows': manifest['num_rows'] == num_rows > 0,
            'shards': all(map(_is_shard, manifest['shards']))
            and sum(shard['rows'] for shard in manifest['shards']) == num_rows,
        }
        wrong = [key for key, right in is_right.items() if not right]
    if wrong:
        raise InputError(f'{file} lacks or spoils {", ".join(wrong)}; copy or prepare it again')
    return manifest


def _is_shard(shard: object) -> bool:
    """Whether an entry describes a file of the folder itself."""
    if not isinstance(shard, dict):
        return False
    kinds = {'file': str, 'rows': int, 'bytes': int, 'sha256': str}
    is_typed = all(isinstance(shard.get(key), kind) for key, kind in kinds.items())
    return is_typed and '/' not in shard['file'] and min(shard['rows'], shard['bytes']) >= 0


def _sha256(file: epath.Path) -> str:
    digest = hashlib.sha256()
    with file.open('rb') as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
