"""Units of packed rows on disk: a shard of rows each, a table of where its documents came from, one manifest for all.

A record of a shard is the row's tokens in the manifest's dtype, then its segment ids as uint32. A shard appears whole;
the manifest, which makes the folder readable, is written last.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int64

from llama_jax.data.containers import size_of
from llama_jax.data.packing import (
    Progress,
    Row,
    RowStream,
    check_seq_len,
    count_rows,
    join_fingerprints,
    token_dtype,
    tokenized_chunks,
)
from llama_jax.data.prepared import FORMAT, MANIFEST, origins_file, sha256_of
from llama_jax.data.units import UNIT_BYTES, Cutter
from llama_jax.errors import InputError, error_line
from llama_jax.storage import REMEDIES, enable_bucket, failure, new_folder, system_failures, write_atomically
from llama_jax.tokenizer.tokenizer import Tokenizer

Origin = tuple[int, int]  # a document's file, by its number in the source, and its record there


class ShardWriter:
    """One unit as it is tokenised; nothing is at its place before `finish`."""

    def __init__(
        self, folder: epath.Path, number: int, tokenizer: Tokenizer, seq_len: int, num_threads: int = 0
    ):
        """Args: folder: there. number: of the unit. num_threads: that tokenise; 0: all cores."""
        self._folder, self._number, self._tokenizer, self._seq_len = folder, number, tokenizer, seq_len
        self._num_threads = num_threads
        self._dtype = token_dtype(tokenizer)
        self._stream = RowStream(self._dtype, seq_len)
        self._origins: list[tuple[int, int, int]] = []
        self._at_exit = contextlib.ExitStack()
        self._file: Any = None
        self._writer: Any = None
        self._num_rows = 0

    def __enter__(self) -> 'ShardWriter':
        return self

    def __exit__(self, *_) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # it was told
                self._writer.close()
        self._at_exit.close()

    @property
    def num_tokens(self) -> int:
        """Those that have come."""
        return self._stream.num_tokens

    def add(self, texts: Sequence[str], origins: Iterable[Origin]) -> None:
        """Tokenises, packs and writes the next documents of the unit."""
        origin = iter(origins)
        for chunk in tokenized_chunks(texts, self._tokenizer, num_threads=self._num_threads):
            starts = (chunk.starts + self._stream.num_tokens).tolist()
            self._origins += [(*place, start) for start, place in zip(starts, origin, strict=False)]
            self._write(self._stream.add(chunk))

    def finish(self) -> dict[str, Any] | None:
        """The unit's entry in the manifest; None where it has no document. Its files are in place then."""
        self._write(self._stream.end())
        if self._file is None:
            return None
        with self._refused():
            self._writer.close()
        self._writer = None
        name = f'rows-{self._number:05d}.array_record'
        assert self._num_rows == count_rows(self._stream.num_tokens, self._seq_len)
        origins = _packed(np.array(self._origins, np.int64))
        with system_failures(f'{self._folder / name} cannot be written'):
            entry = {
                'file': name, 'rows': self._num_rows, 'bytes': self._file.stat().length,
                'sha256': sha256_of(self._file), 'documents': self._stream.num_documents,
                'tokens': self._stream.num_tokens, 'text_bytes': self._stream.num_bytes,
                'fingerprint': self._stream.fingerprint.hexdigest(),
                'documents_sha256': hashlib.sha256(origins).hexdigest(),
            }  # fmt: skip
            write_atomically(self._folder / origins_file(name), origins)
            if '://' in os.fspath(self._folder):
                self._file.copy(self._folder / name, overwrite=True)
            else:
                os.replace(self._file, self._folder / name)
        return entry

    def lengths(self) -> list[int]:
        """Documents of under 2, 4, 8, ... tokens: their number by the bits that the length has."""
        starts = np.array([start for _, _, start in self._origins] + [self._stream.num_tokens])
        bits = [int(length).bit_length() for length in np.diff(starts)]
        return np.bincount(bits, minlength=32).tolist()

    def _write(self, rows: Iterator[Row]) -> None:
        for row in rows:
            writer = self._writer or self._open()
            with self._refused():
                writer.write(
                    row['tokens'].astype(self._dtype).tobytes() + row['segment_ids'].astype('<u4').tobytes()
                )
            self._num_rows += 1

    def _open(self) -> Any:
        from array_record.python import array_record_module

        if '://' in os.fspath(self._folder):  # ArrayRecord reads of buckets and does not write to them
            local = epath.Path(self._at_exit.enter_context(tempfile.TemporaryDirectory()))
        else:
            local = self._folder
        self._file = local / f'.rows-{self._number:05d}.{os.getpid()}.partial'
        self._at_exit.callback(self._file.unlink, missing_ok=True)
        with self._refused():
            self._writer = array_record_module.ArrayRecordWriter(os.fspath(self._file), 'group_size:1,zstd:1')
        return self._writer

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if '() failed: ' not in str(error):  # how ArrayRecord tells what the system has refused
                raise
            number = next((number for number in REMEDIES if os.strerror(number) in str(error)), None)
            raise failure(f'{self._folder} cannot be written: {error_line(error)}', number) from error


def _packed(origins: Int64[np.ndarray, 'documents 3']) -> bytes:
    import zstandard

    file = io.BytesIO()
    np.save(file, origins)
    return zstandard.ZstdCompressor(level=9).compress(file.getvalue())


def read_origins(folder: epath.Path, shard: Mapping[str, Any]) -> Int64[np.ndarray, 'documents 3']:
    """(file, record, first token) of every document of a shard, which is an entry of the manifest.

    Raises:
      InputError: the table is damaged or not there.
    """
    import zstandard

    file = folder / origins_file(shard['file'])
    try:
        packed = file.read_bytes()
        if (
            shard.get('documents_sha256', hashlib.sha256(packed).hexdigest())
            != hashlib.sha256(packed).hexdigest()
        ):
            raise InputError(f'{file} differs from what was written (sha256); copy or prepare it again')
        data = zstandard.ZstdDecompressor().decompress(packed)
        return np.load(io.BytesIO(data), allow_pickle=False).reshape(-1, 3).astype(np.int64)
    except (OSError, ValueError, EOFError, zstandard.ZstdError, tokenize.TokenError) as error:
        raise InputError(f'{file} cannot be read ({error_line(error)}); copy or prepare it again') from error


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all units of a folder have in common."""

    tokenizer: Tokenizer
    seq_len: int
    unit_bytes: int


def write_manifest(
    folder: epath.Path, shards: Sequence[dict[str, Any]], shape: Shape, **described: Any
) -> dict[str, Any]:
    """Writes the manifest of units that are finished, and returns it.

    Args:
      folder: of the units.
      shards: what `ShardWriter.finish` gave, in order.
      shape: what they have in common.
      **described: what else there is to say of them.
    """
    manifest = {
        'format': FORMAT,
        'seq_len': shape.seq_len,
        'vocab_size': shape.tokenizer.vocab_size,
        'dtype': token_dtype(shape.tokenizer).name,
        'num_rows': sum(shard['rows'] for shard in shards),
        'num_documents': sum(shard['documents'] for shard in shards),
        'num_tokens': sum(shard['tokens'] for shard in shards),
        'num_bytes': sum(shard['text_bytes'] for shard in shards),
        'fingerprint': join_fingerprints([shard['fingerprint'] for shard in shards]),
        'tokenizer_sha256': shape.tokenizer.sha256,
        'unit_bytes': shape.unit_bytes,
        'libraries': _libraries(),
        **described,
        'shards': list(shards),
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


@functools.cache
def _libraries() -> dict[str, str]:
    """Versions of what the rows depend on."""
    names = ('array_record', 'numpy', 'sentencepiece', 'tiktoken', 'tokenizers', 'zstandard')
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_prepared(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    seq_len: int,
    directory: str | os.PathLike,
    *,
    unit_bytes: int = UNIT_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenises, packs and writes documents as they come, in this process; `preparation` does files in many.

    Args:
      documents: texts, read once.
      tokenizer: gives the ids.
      seq_len: T; a row has T + 1 tokens.
      directory: made where missing; it appears whole, and in a bucket is whole when its manifest is there.
      unit_bytes: of text in a unit, which is packed by itself.
      progress: called after each unit's documents of some 4 MB.

    Returns:
      The manifest.

    Raises:
      InputError: there is something in the directory already, or no document.
      SystemFailure: the disk is full, or broken.
    """
    enable_bucket(directory)
    folder = epath.Path(directory)
    check_seq_len(seq_len)
    if (folder / MANIFEST).exists():
        raise InputError(f'{directory} already holds prepared data; delete it or write elsewhere')
    with contextlib.ExitStack() as at_exit:
        place = folder if '://' in os.fspath(folder) else at_exit.enter_context(new_folder(folder))
        shards, cutter = [], Cutter(unit_bytes)
        numbers, unit, num_bytes = itertools.count(), 0, 0

        def with_units() -> Iterator[tuple[int, int, str]]:
            nonlocal unit
            for number, text in zip(numbers, documents, strict=False):
                unit += text != '' and cutter.begins(size_of(text), number == 0)
                yield unit, number, text

        for unit_number, group in itertools.groupby(with_units(), key=lambda item: item[0]):
            with ShardWriter(place, unit_number, tokenizer, seq_len) as writer:
                for batch in batches_of(((number, text) for _, number, text in group if text)):
                    writer.add([text for _, text in batch], ((0, number) for number, _ in batch))
                    num_bytes += sum(size_of(text) for _, text in batch)
                    if progress:
                        progress(batch[-1][0] + 1, num_bytes)
                shards += filter(None, [writer.finish()])
        if not shards:
            raise InputError('the corpus has 0 tokens; 2 are the least to train on: give more text')
        return write_manifest(place, shards, Shape(tokenizer, seq_len, unit_bytes))


def batches_of(
    documents: Iterable[tuple[Any, str]], max_chars: int = 4 << 20
) -> Iterator[list[tuple[Any, str]]]:
    """Runs of some four million letters, which are tokenised together."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= max_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
