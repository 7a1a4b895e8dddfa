"""Where documents come from: files, TFDS datasets, Python's own source code; one at a time, in order.

A source is one string:

    python_stdlib | python_stdlib:train | python_stdlib:validation
    tfds:NAME[/CONFIG][:SPLIT][@DATA_DIR]      tfds:lm1b:train[:10%]@gs://bucket/tensorflow_datasets
    a path or a glob, local or gs://           corpus/**/*.jsonl.gz

Files are told apart by suffix, after `.gz`: `.jsonl` and `.json` hold one JSON object a line; `.array_record`
and `.arrayrecord` hold one UTF-8 document a record; anything else is UTF-8 text. A line, a record and a document have
at most 128 MiB (`json_file.MAX_BYTES`), of which a tokenizer takes some gigabytes.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import logging
import os
import pathlib
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator

from etils import epath

from llama_jax.json_file import MAX_BYTES, parse_json, read_lines, show_json
from llama_jax.storage import enable_bucket
from llama_jax.types import InputError, error_line

_log = logging.getLogger(__name__)


def read_documents(source: str, *, text_key: str = 'text', separator: str = '') -> Iterator[str]:
    r"""Yields the documents of one source in a fixed order, leaving out empty ones.

    Args:
      source: see the module's docstring.
      text_key: field that holds the text, in JSON lines and TFDS.
      separator: where text files are cut into documents, as `<|endoftext|>`; newlines beside it are dropped.
        Empty: a file is a document.

    Yields:
      Text, never empty.

    Raises:
      InputError: names the source or the file, with the line, record or byte where reading stopped.
    """
    if source == 'python_stdlib' or source.startswith('python_stdlib:'):
        documents = _read_python_stdlib(source)
    elif source.startswith('tfds:'):
        documents = _read_tfds(source, text_key)
    else:
        documents = (text for file in _find_files(source) for text in _read_file(file, text_key, separator))
    empty = True
    for text in documents:
        if text:
            empty = False
            yield text
    if empty:
        raise InputError(f'source {source!r} holds no text: every document is empty')


def check_source(source: str) -> None:
    """Refuses what is not there or no source, without reading it.

    Raises:
      InputError: names the source.
    """
    if source == 'python_stdlib' or source.startswith('python_stdlib:'):
        _stdlib_split(source)
    elif source.startswith('tfds:'):
        _tfds_parts(source)
    else:
        _find_files(source)


# Python's own source code. Debian and others package `test`, `idlelib` and `lib2to3` apart, and Python 3.13
# dropped the last: without them the corpus is nearly the same on every machine. Tests are also full of files
# meant to be broken. `_sysconfigdata*` records the machine that Python was built on.
_NOT_STDLIB = {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idlelib', 'lib2to3'}


def _read_python_stdlib(source: str) -> Iterator[str]:
    split = _stdlib_split(source)
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    skipped = 0
    for name in sorted(_python_files(root)):
        if split and split != _split_of(name):
            continue
        try:
            with tokenize.open(root / name) as file:  # the encoding that the file declares (PEP 263)
                yield file.read()
        except (SyntaxError, UnicodeDecodeError):
            skipped += 1
    if skipped:
        _log.warning('%s: left out %d files that do not decode', source, skipped)


def _stdlib_split(source: str) -> str:
    split = source.partition(':')[2]
    if split not in ('', 'train', 'validation'):
        raise InputError(
            f'source {source!r}: no split {split!r}; use python_stdlib:train or python_stdlib:validation'
        )
    return split


def _python_files(root: pathlib.Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        for name in files:
            if name.endswith('.py') and not name.startswith('_sysconfigdata'):
                yield (pathlib.Path(folder) / name).relative_to(root).as_posix()


def _split_of(name: str) -> str:
    """One file in twenty validates; its path alone decides, so a new Python release moves no file across."""
    return 'validation' if hashlib.sha256(name.encode()).digest()[0] % 20 == 0 else 'train'


def _tfds_parts(source: str) -> tuple[str, str, str | None]:
    """(name, split, data_dir) of a TFDS source; a bucket is made ready."""
    match = re.fullmatch(r'tfds:([^:@]+)(?::([^@]+))?(?:@(.+))?', source)
    if not match:
        raise InputError(f'source {source!r} is not of the form tfds:NAME[/CONFIG][:SPLIT][@DATA_DIR]')
    if match[3]:
        enable_bucket(match[3])
    return match[1], match[2] or 'train', match[3]


def _read_tfds(source: str, text_key: str) -> Iterator[str]:
    import tensorflow_datasets as tfds

    name, split, data_dir = _tfds_parts(source)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
        fields = sorted(builder.info.features or ())
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
    if text_key not in fields:
        raise InputError(f'source {source!r} has no field {text_key!r}: its fields are {", ".join(fields)}')
    try:
        examples = builder.as_data_source(split)
    except Exception as error:
        raise InputError(
            f'source {source!r}: cannot read split {split!r} of {", ".join(builder.info.splits)} '
            f'({error_line(error)}); it must be prepared with file_format=array_record'
        ) from error
    for number in range(len(examples)):
        text = examples[number][text_key]
        if isinstance(text, bytes):
            text = _decode(text, f'source {source!r} example {number}')
        if not isinstance(text, str):
            raise InputError(f'source {source!r}: field {text_key!r} holds {type(text).__name__}, not text')
        yield text


def _find_files(source: str) -> list[epath.Path]:
    """Files of a path or glob, sorted by name."""
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


def _read_file(path: epath.Path, text_key: str, separator: str) -> Iterator[str]:
    name = os.fspath(path)
    if re.search(r'\.array_?record(-\d+-of-\d+)?$', name):
        yield from _read_array_record(name)
        return
    kind = pathlib.PurePosixPath(name.removesuffix('.gz')).suffix
    try:
        with path.open('rb') as raw:
            file = gzip.GzipFile(fileobj=raw) if name.endswith('.gz') else io.BufferedReader(raw)
            if kind in ('.jsonl', '.json'):
                yield from _read_json_lines(file, name, text_key)
            else:
                yield from _read_text(file, name, separator)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f'{name} is cut short or not gzip ({error_line(error)}); copy it again') from error
    except OSError as error:
        raise InputError(f'cannot read {name}: {error.strerror or error_line(error)}') from error


def _read_text(file: io.BufferedIOBase, name: str, separator: str) -> Iterator[str]:
    mark = separator.encode()
    rest, searched, offset = bytearray(), 0, 0  # a bytearray grows in place
    while block := file.read(1 << 24):
        rest += block
        begin = 0
        while mark and (end := rest.find(mark, searched)) >= 0:  # no UTF-8 sequence begins inside another
            yield _decode(bytes(rest[begin:end]), name, offset + begin).strip('\r\n')
            begin = searched = end + len(mark)
        del rest[:begin]
        offset += begin
        searched = max(len(rest) - len(mark) + 1, 0)
        if len(rest) > MAX_BYTES:
            raise InputError(f'{name} holds a document of over {MAX_BYTES >> 20} MiB; cut it by a separator')
    text = _decode(bytes(rest), name, offset)
    yield text.strip('\r\n') if mark else text


def _read_json_lines(file: io.BufferedIOBase, name: str, text_key: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(read_lines(file, name, MAX_BYTES), start=1):
        where = f'{name} line {number}'
        text = _decode(line, where, offset)
        offset += len(line)
        if not text.strip():
            continue
        item = parse_json(text, where)
        if not isinstance(item, dict):
            raise InputError(f'{where} holds a JSON {type(item).__name__}, not one object a line')
        if text_key not in item:
            fields = show_json(', '.join(item))[1:-1] or 'none'
            raise InputError(f'{where} has no field {text_key!r}: its fields are {fields}')
        if not isinstance(item[text_key], str):
            raise InputError(f'{where}: field {text_key!r} is {type(item[text_key]).__name__}, not text')
        yield item[text_key]


def _read_array_record(name: str) -> Iterator[str]:
    from array_record.python import array_record_module

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
            yield _decode(record, f'{name} record {number}')
    finally:
        with contextlib.suppress(RuntimeError):  # closing a broken file raises again what is wrong with it
            reader.close()


def _decode(data: bytes, where: str, offset: int = 0) -> str:
    """Strict UTF-8; a byte order mark at the start of a file is dropped."""
    try:
        return data.decode('utf-8-sig' if offset == 0 else 'utf-8')
    except UnicodeDecodeError as error:
        raise InputError(
            f'{where} is not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}'
        ) from error
