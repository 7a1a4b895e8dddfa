"""What files of data are made of: lines, JSON, ArrayRecord, Parquet, Arrow, TFDS; told apart by suffix, read in order.

`.jsonl` and `.json` hold JSON, `.array_record` and `.arrayrecord` records of bytes, `.parquet`, `.arrow` and `.feather`
rows; after the first two, and after text, there may be `.gz`, `.zst`, `.bz2` or `.xz`: of several members or frames,
and of windows of up to 2 GiB.
"""

import bz2
import contextlib
import glob
import gzip
import io
import itertools
import lzma
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llama_jax.errors import InputError, error_line
from llama_jax.json_file import MAX_BYTES, read_array
from llama_jax.storage import bucket_reason, enable_bucket


class Place(NamedTuple):
    """Where a record begins in its file, so that reading can start there.

    Attributes:
      number: records before it; of JSON lines, lines.
      offset: bytes before it of the file as it is unpacked; 0 in files that find a record by its number.
    """

    number: int = 0
    offset: int = 0


START = Place()


class Record(NamedTuple):
    """One record of a file.

    Attributes:
      where: its name in messages, 'FILE line 3'.
      place: where it begins.
      content: JSON text, bytes, a mapping, or what is wrong with this record alone, which others do not suffer from.
    """

    where: str
    place: Place
    content: Any


_PACKED = {'.gz': 'gzip', '.zst': 'Zstandard', '.bz2': 'bzip2', '.xz': 'xz'}
_MAX_WINDOW = 1 << 31  # of Zstandard, what `zstd --long=31` makes
_PACKED_BYTES = 1 << 12  # of it at a time, which may unpack to 32,768 times as much


def find_files(source: str) -> list[epath.Path]:
    """Files of a path or glob, sorted by name.

    Raises:
      InputError: there is none.
    """
    if not source:
        raise InputError('a data source is empty: give a path, a glob, tfds:NAME or python_stdlib')
    enable_bucket(source)
    path = epath.Path(source)
    is_local = '://' not in source
    if (magic := re.search(r'[*?[]', source)) and not (is_local and path.is_file()):  # that is called so
        if is_local:  # epath knows no `**`
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
    """The suffix that tells what a file holds: 'jsonl', 'json', 'parquet', 'arrow', 'array_record', or any other."""
    name = os.fspath(path)
    if re.search(r'\.array_?record(-\d+-of-\d+)?$', name):
        return 'array_record'
    inner, suffix = os.path.splitext(name)
    kind = pathlib.PurePosixPath(inner if suffix in _PACKED else name).suffix.removeprefix('.')
    return 'arrow' if kind == 'feather' else kind


@contextlib.contextmanager
def open_file(path: epath.Path, offset: int = 0) -> Iterator[Any]:
    """A file's bytes as they are unpacked, from `offset` on; what cannot be read while it is open is refused.

    Raises:
      InputError: names the file.
    """
    import zstandard

    name = os.fspath(path)
    packed = _PACKED.get(os.path.splitext(name)[1], '')
    try:
        with path.open('rb') as raw:
            file = _unpacked(raw, packed)
            if not packed:
                file.seek(offset)
                offset = 0
            while offset and (block := file.read(min(offset, 1 << 20))):
                offset -= len(block)
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise InputError(
            f'{name} is cut short or not {packed} ({error_line(error)}); copy it again'
        ) from error
    except Exception as error:
        if reason := bucket_reason(error):
            raise InputError(f'cannot read {name}: {reason}') from error
        if not isinstance(error, OSError):
            raise
        if packed and error.errno is None:  # what bz2 says of the content
            raise InputError(
                f'{name} is cut short or not {packed} ({error_line(error)}); copy it again'
            ) from error
        raise InputError(f'cannot read {name}: {error.strerror or error_line(error)}') from error


def _unpacked(raw: Any, packed: str) -> Any:
    match packed:
        case 'gzip':
            return gzip.GzipFile(fileobj=raw)
        case 'bzip2':
            return bz2.BZ2File(raw)
        case 'xz':
            return lzma.LZMAFile(raw)
        case 'Zstandard':
            return io.BufferedReader(_ZstdFile(raw), 1 << 20)
    return io.BufferedReader(raw)


class _ZstdFile(io.RawIOBase):
    """Frames, one after the other. The package's own reader takes the end of a file within a frame for its end."""

    def __init__(self, raw: Any):
        self._raw, self._frame, self._packed, self._ready = raw, None, b'', b''

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._packed and not (block := self._raw.read(_PACKED_BYTES)):
                if self._frame is None:
                    return 0
                raise EOFError('it ends within a frame')
            self._packed, block = b'', self._packed or block
            if self._frame is None:
                import zstandard

                self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
            self._ready = self._frame.decompress(block)
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def read_json_texts(path: epath.Path, start: Place = START) -> Iterator[Record]:
    """The JSON text of every item: of a line each, or of the array that a `.json` file may be.

    Raises:
      InputError: the file cannot be read. A line that is too long or no UTF-8 is a record that says so.
    """
    name = os.fspath(path)
    if kind_of(path) == 'json' and _is_array(path):
        with open_file(path) as file:
            items = itertools.islice(enumerate(read_array(file, name, MAX_BYTES)), start.number, None)
            for number, item in items:
                where = f'{name} record {number}'
                yield Record(where, Place(number), _decoded(item, where, offset=1))
        return
    number, offset = start
    with open_file(path, offset) as file:
        while line := file.readline(MAX_BYTES + 1):
            where, place = f'{name} line {number + 1}', Place(number, offset)
            number, offset = number + 1, offset + len(line)
            if len(line) > MAX_BYTES:
                while not line.endswith(b'\n') and (line := file.readline(1 << 20)):  # the rest of it
                    offset += len(line)
                error = InputError(f'{where} has more than {MAX_BYTES >> 20} MiB; cut it into several')
                yield Record(where, place, error)
                continue
            text = _decoded(line, where, place.offset)
            if isinstance(text, InputError) or (text and not text.isspace()):
                yield Record(where, place, text)


def _is_array(path: epath.Path) -> bool:
    with open_file(path) as file:
        return file.read(64).removeprefix(b'\xef\xbb\xbf').lstrip().startswith(b'[')


def read_array_record(path: epath.Path, start: Place = START) -> Iterator[Record]:
    """The records of an ArrayRecord file.

    Raises:
      InputError: it is damaged.
    """
    from array_record.python import array_record_module

    name = os.fspath(path)
    reader = array_record_module.ArrayRecordReader(name)
    try:
        if not reader.ok():  # a file cut short opens without an error, and with no record
            raise InputError(f'{name} is cut short or not an ArrayRecord file; copy or write it again')
        for number in range(start.number, reader.num_records()):
            where = f'{name} record {number}'
            try:
                content = reader.read([number])[0]
            except (RuntimeError, IndexError) as error:
                raise InputError(f'{where} is damaged; copy or write the file again') from error
            if len(content) > MAX_BYTES:
                content = InputError(f'{where} has over {MAX_BYTES >> 20} MiB; cut it into several')
            yield Record(where, Place(number), content)
    finally:
        with contextlib.suppress(RuntimeError):  # closing a broken file raises again what is wrong with it
            reader.close()


def size_of(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode('utf-8', 'surrogatepass'))


def look_up(item: Mapping[str, Any], key: str) -> Any:
    """The value at 'key' or at 'a.b'; None where there is none."""
    if key in item:
        return item[key]
    head, dot, rest = key.partition('.')
    inner = item.get(head)
    return look_up(inner, rest) if dot and isinstance(inner, Mapping) else None


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


def _decoded(data: bytes, where: str, offset: int) -> str | InputError:
    try:
        return decode(data, where, offset)
    except InputError as error:
        return error


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
