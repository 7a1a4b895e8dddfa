"""Where documents come from: files, TFDS datasets, Python's own source code; one at a time, in order.

A source is one string:

    python_stdlib | python_stdlib:train | python_stdlib:validation
    tfds:NAME[/CONFIG][:SPLIT][@DATA_DIR]      tfds:lm1b:train[:10%]@gs://bucket/tensorflow_datasets
    a path or a glob, local or gs://           corpus/**/*.jsonl.gz

Files are told apart by suffix: `.jsonl` and `.json` hold one JSON object a line, or one array of them; `.parquet` and
`.arrow` rows; `.array_record` and `.arrayrecord` one UTF-8 document a record; `.txt`, `.md`, source code and files
without a suffix UTF-8 text. JSON lines and text may be packed (`.gz`, `.zst`, `.bz2`, `.xz`). A line, a record and a
document have at most 128 MiB (`json_file.MAX_BYTES`), of which a tokenizer takes some gigabytes.
"""

import dataclasses
import hashlib
import logging
import os
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.containers import (
    START,
    Place,
    Record,
    check_tfds,
    decode,
    find_files,
    kind_of,
    look_up,
    open_file,
    open_tfds,
    read_array_record,
    read_json_texts,
)
from llama_jax.data.tables import read_table
from llama_jax.errors import InputError
from llama_jax.json_file import MAX_BYTES, parse_json, show_json

_log = logging.getLogger(__name__)


_TEXT = frozenset((
    '', 'txt', 'text', 'md', 'rst', 'tex', 'bash', 'c', 'cc', 'cpp', 'cs', 'css', 'cu', 'el', 'erl', 'ex', 'f90', 'go',
    'h', 'hpp', 'hs', 'java', 'jl', 'js', 'kt', 'lean', 'lisp', 'lua', 'm', 'ml', 'php', 'pl', 'py', 'r', 'rb', 'rs',
    'scala', 'sh', 'sql', 'swift', 'ts', 'v',
))  # fmt: skip
_RECORDS = frozenset(('jsonl', 'json', 'parquet', 'arrow', 'array_record'))


@dataclasses.dataclass(frozen=True)
class Reading:
    """How texts are taken out of files.

    Attributes:
      text_key: field that holds the text, in JSON, Parquet, Arrow and TFDS; 'a.b' for `b` in `a`.
      separator: where text files are cut into documents, as `<|endoftext|>`; newlines beside it are dropped.
        Empty: a file is a document.
    """

    text_key: str = 'text'
    separator: str = ''


def read_documents(
    source: str, *, text_key: str = 'text', separator: str = '', bad: BadRecords | None = None
) -> Iterator[str]:
    r"""Yields the documents of one source in a fixed order, leaving out empty ones.

    Args:
      source: see the module's docstring.
      text_key: see `Reading`.
      separator: see `Reading`.
      bad: what is done with records that hold no text; None: the first one stops.

    Yields:
      Text, never empty.

    Raises:
      InputError: names the source or the file, with the line, record or byte where reading stopped.
    """
    empty, reading = True, Reading(text_key, separator)
    for file in list_files(source):
        for text in read_texts(file, reading, bad):
            empty = False
            yield text
    if empty:
        raise InputError(f'source {source!r} holds no text: every document is empty')


def read_texts(file: str, reading: Reading, bad: BadRecords | None = None) -> Iterator[str]:
    """The texts of one of `list_files` that are not empty; see `read_documents`."""
    for record in read_file(file, reading):
        if isinstance(record.content, InputError):
            if bad is None:
                raise record.content
            bad.add(record.content)
        elif record.content:
            yield record.content


def list_files(source: str) -> list[str]:
    """What a source consists of, in order: names of files; a source that is none of files is one itself.

    Raises:
      InputError: there is none, or one of a suffix that is not known.
    """
    if source == 'python_stdlib' or source.startswith('python_stdlib:'):
        _stdlib_split(source)
        return [source]
    if source.startswith('tfds:'):
        check_tfds(source)
        return [source]
    files = find_files(source)
    for file in files:
        if kind_of(file) not in _TEXT | _RECORDS:
            raise InputError(
                f'{os.fspath(file)} is of no known kind; they are .jsonl .json .txt .md and source code, each also '
                'with .gz .zst .bz2 .xz; .parquet .arrow .array_record; or no suffix for text'
            )
    return [os.fspath(file) for file in files]


def read_file(file: str, reading: Reading, start: Place = START) -> Iterator[Record]:
    """The records of one of `list_files` from `start` on; the content of each is its text, or what is wrong with it.

    Raises:
      InputError: the file itself cannot be read, or its records have no such field.
    """
    if file.startswith('python_stdlib'):
        yield from _read_python_stdlib(file, start)
        return
    if file.startswith('tfds:'):
        yield from _read_tfds(file, reading.text_key, start)
        return
    path = epath.Path(file)
    if kind_of(path) not in _RECORDS:
        with open_file(path, start.offset) as opened:
            yield from _read_text(opened, file, reading.separator, start)
        return
    for record in _read_records(path, start, reading.text_key.partition('.')[0]):
        try:
            yield record._replace(content=_text_of(record, reading.text_key))
        except InputError as error:
            yield record._replace(content=error)


def _read_records(path: epath.Path, start: Place, column: str = '') -> Iterator[Record]:
    match kind_of(path):
        case 'parquet' | 'arrow':
            return read_table(path, start, column)
        case 'array_record':
            return read_array_record(path, start)
        case _:
            return read_json_texts(path, start)


def read_fields(file: str, text_key: str, number: int) -> dict[str, Any]:
    """What a record has beside its text: its address, date or licence, by the names that its layout gives them.

    Args:
      file: one of `list_files`.
      text_key: see `Reading`; what stands beside it within another field is kept.
      number: of the record, from 0; of JSON lines, the line.

    Returns:
      Empty where records are nothing but text.

    Raises:
      InputError: the file cannot be read, or has no such record.
    """
    if file.startswith(('python_stdlib', 'tfds:')) or kind_of(epath.Path(file)) not in _RECORDS:
        return {}
    path = epath.Path(file)
    # Lines are found by those before them alone.
    start = Place(number) if kind_of(path) in ('parquet', 'arrow', 'array_record') else START
    for record in _read_records(path, start):
        if record.place.number == number:
            content = record.content
            item = parse_json(content, record.where) if isinstance(content, str) else content
            return _without(item, text_key) if isinstance(item, dict) else {}
    raise InputError(f'{file} has no record {number} any more; it is not the file that was prepared')


def _without(item: Mapping[str, Any], key: str) -> dict[str, Any]:
    if key in item:
        return {name: value for name, value in item.items() if name != key}
    head, dot, rest = key.partition('.')
    inner = item.get(head)
    if not dot or not isinstance(inner, Mapping):
        return dict(item)
    left = _without(inner, rest)
    return {name: value for name, value in item.items() if name != head} | ({head: left} if left else {})


def check_source(source: str) -> None:
    """Refuses what is not there or no source, without reading it.

    Raises:
      InputError: names the source.
    """
    list_files(source)


# Python's own source code. Debian and others package `test`, `idlelib` and `lib2to3` apart, and Python 3.13
# dropped the last: without them the corpus is nearly the same on every machine. Tests are also full of files
# meant to be broken. `_sysconfigdata*` records the machine that Python was built on.
_NOT_STDLIB = {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idlelib', 'lib2to3'}


def _read_python_stdlib(source: str, start: Place) -> Iterator[Record]:
    split = _stdlib_split(source)
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    names = [name for name in sorted(_python_files(root)) if not split or split == _split_of(name)]
    skipped = 0
    for number, name in enumerate(names):
        if number < start.number:
            continue
        try:
            with tokenize.open(root / name) as file:  # the encoding that the file declares (PEP 263)
                yield Record(f'{source} file {name}', Place(number), file.read())
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


def _read_text(file: Any, name: str, separator: str, start: Place = START) -> Iterator[Record]:
    mark = separator.encode()
    rest, searched, (number, offset) = bytearray(), 0, start  # a bytearray grows in place
    while block := file.read(1 << 24):
        rest += block
        begin = 0
        while mark and (end := rest.find(mark, searched)) >= 0:  # no UTF-8 sequence begins inside another
            yield _text_record(bytes(rest[begin:end]), name, number, offset + begin, '\r\n')
            number, begin = number + 1, end + len(mark)
            searched = begin
        del rest[:begin]
        offset += begin
        searched = max(len(rest) - len(mark) + 1, 0)
        if len(rest) > MAX_BYTES:
            raise InputError(f'{name} holds a document of over {MAX_BYTES >> 20} MiB; cut it by a separator')
    yield _text_record(bytes(rest), name, number, offset, '\r\n' if mark else '')


def _text_record(data: bytes, name: str, number: int, offset: int, strip: str) -> Record:
    where, place = f'{name} document {number}', Place(number, offset)
    try:
        text = decode(data, name, offset)
    except InputError as error:
        return Record(where, place, error)
    return Record(where, place, text.strip(strip) if strip else text)


def _read_tfds(source: str, text_key: str, start: Place) -> Iterator[Record]:
    examples, fields = open_tfds(source)
    if text_key not in fields:
        raise InputError(
            f'source {source!r} has no field {text_key!r}: its fields are {", ".join(fields)}; name another by text_key'
        )
    for number in range(start.number, len(examples)):
        where, text = f'source {source!r} example {number}', examples[number][text_key]
        try:
            if isinstance(text, bytes):
                text = decode(text, where)
            if not isinstance(text, str):
                raise InputError(f'{where}: field {text_key!r} holds {type(text).__name__}, not text')
        except InputError as error:
            text = error
        yield Record(where, Place(number), text)


def _text_of(record: Record, text_key: str) -> str:
    where, content = record.where, record.content
    if isinstance(content, InputError):
        raise content
    if isinstance(content, bytes):
        return decode(content, where)
    item = parse_json(content, where) if isinstance(content, str) else content
    if not isinstance(item, dict):
        raise InputError(f'{where} holds a JSON {type(item).__name__}, not an object')
    text = look_up(item, text_key)
    if text is None and text_key not in item:
        fields = show_json(', '.join(item))[1:-1] or 'none'
        other = '; name another by text_key' if item else ''
        raise InputError(f'{where} has no field {text_key!r}: its fields are {fields}{other}')
    if not isinstance(text, str):
        raise InputError(f'{where}: field {text_key!r} is {type(text).__name__}, not text')
    if len(text) > MAX_BYTES:
        raise InputError(f'{where}: its text has over {MAX_BYTES >> 20} million letters; cut it into several')
    return text
