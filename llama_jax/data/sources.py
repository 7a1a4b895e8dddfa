"""Where documents come from: files, TFDS datasets, Python's own source code; one at a time, in order.

A source is one string:

    python_stdlib | python_stdlib:train | python_stdlib:validation
    tfds:NAME[/CONFIG][:SPLIT][@DATA_DIR]      tfds:lm1b:train[:10%]@gs://bucket/tensorflow_datasets
    a path or a glob, local or gs://           corpus/**/*.jsonl.gz

Files are told apart by suffix, after `.gz` or `.zst`: `.jsonl` and `.json` hold one JSON object a line, or one array
of them; `.array_record` and `.arrayrecord` hold one UTF-8 document a record; anything else is UTF-8 text. A line, a
record and a document have at most 128 MiB (`json_file.MAX_BYTES`), of which a tokenizer takes some gigabytes.
"""

import hashlib
import io
import logging
import os
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator

from etils import epath

from llama_jax.data.containers import (
    check_tfds,
    decode,
    find_files,
    kind_of,
    open_file,
    open_tfds,
    read_array_record,
    read_json_texts,
)
from llama_jax.json_file import MAX_BYTES, parse_json, show_json
from llama_jax.types import InputError

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
        documents = (text for file in find_files(source) for text in _read_file(file, text_key, separator))
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
        check_tfds(source)
    else:
        find_files(source)


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


def _read_text(file: io.BufferedIOBase, name: str, separator: str) -> Iterator[str]:
    mark = separator.encode()
    rest, searched, offset = bytearray(), 0, 0  # a bytearray grows in place
    while block := file.read(1 << 24):
        rest += block
        begin = 0
        while mark and (end := rest.find(mark, searched)) >= 0:  # no UTF-8 sequence begins inside another
            yield decode(bytes(rest[begin:end]), name, offset + begin).strip('\r\n')
            begin = searched = end + len(mark)
        del rest[:begin]
        offset += begin
        searched = max(len(rest) - len(mark) + 1, 0)
        if len(rest) > MAX_BYTES:
            raise InputError(f'{name} holds a document of over {MAX_BYTES >> 20} MiB; cut it by a separator')
    text = decode(bytes(rest), name, offset)
    yield text.strip('\r\n') if mark else text


def _read_tfds(source: str, text_key: str) -> Iterator[str]:
    examples, fields = open_tfds(source)
    if text_key not in fields:
        raise InputError(f'source {source!r} has no field {text_key!r}: its fields are {", ".join(fields)}')
    for number in range(len(examples)):
        text = examples[number][text_key]
        if isinstance(text, bytes):
            text = decode(text, f'source {source!r} example {number}')
        if not isinstance(text, str):
            raise InputError(f'source {source!r}: field {text_key!r} holds {type(text).__name__}, not text')
        yield text


def _read_file(path: epath.Path, text_key: str, separator: str) -> Iterator[str]:
    match kind_of(path):
        case 'array_record':
            for where, record in read_array_record(path):
                yield decode(record, where)
        case 'jsonl' | 'json':
            for where, text in read_json_texts(path):
                yield _text_of(parse_json(text, where), where, text_key)
        case _:
            with open_file(path) as file:
                yield from _read_text(file, os.fspath(path), separator)


def _text_of(item: object, where: str, text_key: str) -> str:
    if not isinstance(item, dict):
        raise InputError(f'{where} holds a JSON {type(item).__name__}, not an object')
    if text_key not in item:
        fields = show_json(', '.join(item))[1:-1] or 'none'
        raise InputError(f'{where} has no field {text_key!r}: its fields are {fields}')
    if not isinstance(item[text_key], str):
        raise InputError(f'{where}: field {text_key!r} is {type(item[text_key]).__name__}, not text')
    return item[text_key]
