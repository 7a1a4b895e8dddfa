"""Records to fine-tune on, out of files of any kind or TFDS; `record_kinds` tells what their keys mean."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.containers import (
    Record,
    check_tfds,
    find_files,
    kind_of,
    look_up,
    open_tfds,
    read_array_record,
    read_json_texts,
)
from llama_jax.data.record_kinds import READERS, Kind, Prompted
from llama_jax.data.tables import read_table
from llama_jax.errors import InputError
from llama_jax.json_file import parse_object


def read_records(
    sources: Sequence[str],
    *,
    kind: type[Kind],
    key_map: Mapping[str, str] | None = None,
    on_error: str | BadRecords = 'stop',
) -> Iterator[Kind]:
    """Yields the records of all sources in order.

    Args:
      sources: paths, globs, `tfds:NAME[:SPLIT][@DATA_DIR]`.
      kind: what they are read as.
      key_map: a key that `record_kinds` lists -> the record's, 'a.b' for `b` in `a`; nothing else is read then.
      on_error: 'stop' at a record that is of no use, or 'skip' it. A collector is told of each, and says nothing.

    Raises:
      InputError: names the file and the record, or the source that holds none.
    """
    bad = on_error if isinstance(on_error, BadRecords) else BadRecords(on_error)
    read = READERS[kind]
    for source in sources:
        found = 0
        for place, item in _items(source):
            found += 1
            try:
                if isinstance(item, InputError):
                    raise item
                if isinstance(item, str):
                    item = parse_object(item, place)
                item = whole = _plain(item)
                if key_map:
                    item = {ours: look_up(item, theirs) for ours, theirs in key_map.items()}
                record = read({key: value for key, value in item.items() if value is not None})
            except InputError as error:
                line = str(error)
                bad.add(error if line.startswith(place) else InputError(f'{place}: {line}'))
                continue
            of_record: dict[str, Any] = {'place': place}
            if kind is Prompted:
                of_record['fields'] = whole
            yield dataclasses.replace(record, **of_record)
        if not found:
            raise InputError(f'source {source!r} holds no record; give a file that does')
    if bad is not on_error:
        bad.log()


def check_records(sources: Sequence[str]) -> None:
    """Refuses sources that are not there, or that no record can be in, before any of them is read.

    Raises:
      InputError: names the first.
    """
    for source in sources:
        if source.startswith('tfds:'):
            check_tfds(source)
            continue
        for path in find_files(source):
            _reader_of(path)


def parse_key_map(text: str) -> dict[str, str]:
    """'instruction=question,output=answer' -> {'instruction': 'question', 'output': 'answer'}.

    Raises:
      InputError: it is not written so.
    """
    pairs = [part.split('=') for part in map(str.strip, text.split(',')) if part]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise InputError(
            f'key_map is {text!r}; write OURS=THEIRS by commas, as instruction=question,output=answer'
        )
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}


def _items(source: str) -> Iterator[tuple[str, Any]]:
    """(place, JSON text or mapping) of each record of a source."""
    if source.startswith('tfds:'):
        examples, _ = open_tfds(source)
        for number in range(len(examples)):
            yield f'{source} example {number}', examples[number]
        return
    for path in find_files(source):
        for record in _reader_of(path)(path):
            yield record.where, record.content


def _reader_of(path: Any) -> Callable[[Any], Iterator[Record]]:
    match kind_of(path):
        case 'json' | 'jsonl':
            return read_json_texts
        case 'parquet' | 'arrow':
            return read_table
        case 'array_record':
            return _json_of_array_record
    raise InputError(
        f'{os.fspath(path)} is no file of records; they are .json and .jsonl (.gz, .zst, .bz2, .xz), .parquet, .arrow, '
        '.array_record'
    )


def _json_of_array_record(path: Any) -> Iterator[Record]:
    for record in read_array_record(path):
        if isinstance(record.content, bytes):
            record = record._replace(content=record.content.decode('utf-8', 'replace'))
        yield record


def _plain(value: Any) -> Any:
    """What TFDS and Parquet give as JSON would: no arrays, no bytes, no empty fields, a list of objects as such."""
    match value:
        case bytes():
            return value.decode('utf-8', 'replace')
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case dict():
            items = {key: _plain(item) for key, item in value.items() if item is not None}
            columns = [item for item in items.values() if isinstance(item, list)]
            turns = {'role', 'content'} <= items.keys() or {'from', 'value'} <= items.keys()
            if turns and len(columns) == len(items) and len({len(column) for column in columns}) == 1:
                return [dict(zip(items, row, strict=True)) for row in zip(*columns, strict=True)]
            return items
        case list() | tuple():
            return [_plain(item) for item in value]
    return value
