"""What files of data are made of: lines, JSON, ArrayRecord, Parquet, TFDS; told apart by suffix, read in order.

`.jsonl` and `.json` hold JSON, `.array_record` and `.arrayrecord` records of bytes, `.parquet` rows; after these there
may be `.gz` or `.zst`, but behind ArrayRecord and Parquet, which are compressed within.
"""

import contextlib
import glob
import gzip
import io
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from llama_jax.json_file import MAX_BYTES, read_array, read_lines
from llama_jax.storage import enable_bucket
from llama_jax.types import InputError, error_line


def find_files(source: str) -> list[epath.Path]:
    """Files of a path or glob, sorted by name.

    Raises:
      InputError: there is none.
    """
    if not source:
        raise InputError('a data source is empty: give a path, a glob, tfds:NAME or python_stdlib')
    enable_bucket(source)
    path = epath.Path(source)
    if magic := re.search(r'[*?[]', source):
        if '://' not in source:  # epath knows no `**`
            found = [epath.Path(name) for name in glob.glob(source, recursive=True)]
        elif '**' in source:
            raise InputError(
                f'source {source!r}: no `**` in a bucket, where it would list everything; use `*`'
            )
        else:
            folder = source[: magic.start()].rpartition('/')[0]
            found = list(epath.Path(folder).glob(source[len(folder) + 1 :]))
        files = sorted((file for file in found if file.is_file()), key=os.fspath)
        if not files:
            raise InputError(f'no file matches {source!r}; give a path or glob that does')
        return files
    if path.is_dir():
        raise InputError(
            f'{source} is a directory without a manifest of prepared rows: finish preparing it, or name its files, '
            f'as in {source.rstrip("/")}{"" if "://" in source else "/**"}/*.jsonl'
        )
    if not path.exists():
        raise InputError(f'no file {source!r}; give a path, a glob, tfds:NAME or python_stdlib')
    return [path]


def kind_of(path: epath.Path) -> str:
    """The suffix that tells what a file holds: 'jsonl', 'json', 'parquet', 'array_record', or any other."""
    name = os.fspath(path)
    if re.search(r'\.array_?record(-\d+-of-\d+)?$', name):
        return 'array_record'
    return pathlib.PurePosixPath(name.removesuffix('.gz').removesuffix('.zst')).suffix.removeprefix('.')


@contextlib.contextmanager
def open_file(path: epath.Path) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, taken out of gzip or Zstandard; what cannot be read while it is open is refused.

    Raises:
      InputError: names the file.
    """
    name = os.fspath(path)
    packed = 'gzip' if name.endswith('.gz') else 'Zstandard' if name.endswith('.zst') else ''
    try:
        with path.open('rb') as raw:
            yield _unpacked(raw, packed)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f'{name} is cut short or not {packed} ({error_line(error)}); copy it again'
        ) from error
    except OSError as error:
        if packed == 'Zstandard' and error.errno is None:  # what pyarrow says of the content
            raise InputError(
                f'{name} is cut short or not {packed} ({error_line(error)}); copy it again'
            ) from error
        raise InputError(f'cannot read {name}: {error.strerror or error_line(error)}') from error


def _unpacked(raw: Any, packed: str) -> Any:
    if packed == 'gzip':
        return gzip.GzipFile(fileobj=raw)
    if packed == 'Zstandard':
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, 'zstd'), 1 << 20)
    return io.BufferedReader(raw)


def read_json_texts(path: epath.Path) -> Iterator[tuple[str, str]]:
    """(place, JSON text) of every item: of a line each, or of the array that a `.json` file may be.

    Raises:
      InputError: the file cannot be read, is no UTF-8, or a text is too long.
    """
    name, offset = os.fspath(path), 0
    with open_file(path) as file:
        head = file.peek(64) if kind_of(path) == 'json' else b''  # pyright: ignore[reportAttributeAccessIssue]
        if head.removeprefix(b'\xef\xbb\xbf').lstrip().startswith(b'['):
            for number, item in enumerate(read_array(file, name, MAX_BYTES)):
                yield f'{name} record {number}', decode(item, f'{name} record {number}', offset=1)
            return
        for number, line in enumerate(read_lines(file, name, MAX_BYTES), start=1):
            where = f'{name} line {number}'
            text = decode(line, where, offset)
            offset += len(line)
            if text.strip():
                yield where, text


def read_array_record(path: epath.Path) -> Iterator[tuple[str, bytes]]:
    """(place, record) of an ArrayRecord file.

    Raises:
      InputError: it is damaged, or a record is too long.
    """
    from array_record.python import array_record_module

    name = os.fspath(path)
    reader = array_record_module.ArrayRecordReader(name)
    try:
        if not reader.ok():  # a file cut short opens without an error, and with no record
            raise InputError(f'{name} is cut short or not an ArrayRecord file; copy or write it again')
        for number in range(reader.num_records()):
            try:
                record = reader.read([number])[0]
            except (RuntimeError, IndexError) as error:
                raise InputError(
                    f'{name} record {number} is damaged; copy or write the file again'
                ) from error
            if len(record) > MAX_BYTES:
                raise InputError(
                    f'{name} record {number} has over {MAX_BYTES >> 20} MiB; cut it into several'
                )
            yield f'{name} record {number}', record
    finally:
        with contextlib.suppress(RuntimeError):  # closing a broken file raises again what is wrong with it
            reader.close()


def read_parquet(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a Parquet file; a batch of rows is in memory at a time.

    Raises:
      InputError: it is damaged or no such file.
    """
    import pyarrow
    from pyarrow import parquet

    name, number = os.fspath(path), 0
    try:
        with path.open('rb') as file:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield f'{name} record {number}', row
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f'{name} is cut short or not a Parquet file ({error_line(error)}); copy it again'
        ) from error


def check_tfds(source: str) -> tuple[str, str, str | None]:
    """(name, split, data_dir) of a TFDS source; a bucket is made ready.

    Raises:
      InputError: it is not of that form.
    """
    match = re.fullmatch(r'tfds:([^:@]+)(?::([^@]+))?(?:@(.+))?', source)
    if not match:
        raise InputError(f'source {source!r} is not of the form tfds:NAME[/CONFIG][:SPLIT][@DATA_DIR]')
    if match[3]:
        enable_bucket(match[3])
    return match[1], match[2] or 'train', match[3]


def open_tfds(source: str) -> tuple[Sequence[Any], list[str]]:
    """(examples, names of their fields) of a TFDS data set that is prepared.

    Raises:
      InputError: it is not, or has no such split.
    """
    import tensorflow_datasets as tfds

    name, split, data_dir = check_tfds(source)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
        fields: list[str] = sorted(builder.info.features or ())
        prepared = bool(builder.info.splits)
    except Exception as error:  # whatever a builder of somebody else's raises
        raise InputError(
            f'source {source!r}: TFDS finds no dataset {name!r} in {data_dir or "its default data_dir"} '
            f'({error_line(error)}); some builders need TensorFlow until they are prepared'
        ) from error
    if not prepared:
        raise InputError(
            f'source {source!r}: {name!r} is not prepared in {builder.data_dir}; run '
            f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
        )
    try:
        return builder.as_data_source(split), fields
    except Exception as error:
        raise InputError(
            f'source {source!r}: cannot read split {split!r} of {", ".join(builder.info.splits)} '
            f'({error_line(error)}); it must be prepared with file_format=array_record'
        ) from error


def decode(data: bytes, where: str, offset: int = 0) -> str:
    """Strict UTF-8; a byte order mark at the start of a file is dropped.

    Raises:
      InputError: names the byte.
    """
    try:
        return data.decode('utf-8-sig' if offset == 0 else 'utf-8')
    except UnicodeDecodeError as error:
        raise InputError(
            f'{where} is not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}'
        ) from error
