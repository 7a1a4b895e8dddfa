"""The two tasks of a preparation, each with a record of what it has done: reading files once, writing units."""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.containers import size_of
from llama_jax.data.meeting import BEGUN, Meeting, write_where_all_meet
from llama_jax.data.preparation import Advance, Preparation
from llama_jax.data.prepared import VALIDATION, origins_file
from llama_jax.data.shards import ShardWriter, batches_of
from llama_jax.data.units import FileScan, Piece, is_held_out, join_pieces, read_piece, scan_file, state_of
from llama_jax.data.workers import Tell, Workers
from llama_jax.errors import InputError
from llama_jax.json_file import read_object
from llama_jax.tokenizer.tokenizer import Tokenizer

_FILES_A_SCAN = 1000  # at most, for many small ones

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Scan:
    """A task: some files of one source, read once."""

    record: str
    source: int
    first: int
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A task: a unit of one source, written."""

    record: str
    source: int
    number: int
    pieces: tuple[Piece, ...]
    files: tuple[str, ...]  # of the pieces


# ---- Reading once ----------------------------------------------------------------------------------------------------


def scan_all(
    preparation: Preparation, work: epath.Path, files: Sequence[Sequence[str]], workers: Workers, meeting: Meeting,
    advance: Callable[[Advance], None],
) -> list[list[FileScan]]:  # fmt: skip
    """Reads every file once; of all machines, when they are done.

    Raises:
      InputError: a file cannot be read, or too many records have no text.
    """
    tasks = []
    for source, names in enumerate(files):
        for first, batch in _batches_of_files(names, preparation.unit_bytes):
            tasks.append(_Scan(f'scan-{len(tasks):06d}.json', source, first, tuple(batch)))
    own = _left(tasks, lambda task: _is_scanned(work / task.record), work, meeting)
    _run(
        own, functools.partial(_scan, preparation=preparation, work=os.fspath(work)), workers,
        Advance('reading', 0, sum(len(task.files) for task in own)), advance, lambda task: len(task.files),
    )  # fmt: skip
    _await_records(work, tasks, meeting)
    scans: list[list[FileScan]] = [[] for _ in files]
    for task in tasks:
        scans[task.source] += map(FileScan.from_json, read_object(work / task.record)['files'])
    bad = sum(scan.num_bad for group in scans for scan in group)
    named = [line for group in scans for scan in group for line in scan.bad][:5]
    if bad and preparation.on_error == 'stop':
        raise InputError(f'{named[0]}; mend it, or leave such records out (on_error skip)')
    if preparation.max_errors and bad > preparation.max_errors:
        raise InputError(
            f'{bad} records have no text, and max_errors is {preparation.max_errors}; the first: {"; ".join(named)}'
        )
    if bad:
        _log.warning('left out %d bad records, the first: %s', bad, '; '.join(named))
    for source, group in zip(preparation.sources, scans, strict=True):
        if not any(scan.num_documents for scan in group):
            lines = [line for scan in group for line in scan.bad]
            why = f'every record is bad or empty, as {lines[0]}' if lines else 'every document is empty'
            raise InputError(f'source {",".join(source.inputs)!r} holds no text: {why}')
    return scans


def _batches_of_files(names: Sequence[str], limit: int) -> Iterator[tuple[int, list[str]]]:
    batch, size, first = [], 0, 0
    for number, name in enumerate(names):
        batch.append(name)
        size += state_of(name)[0]
        if size >= limit or len(batch) == _FILES_A_SCAN:
            yield first, batch
            batch, size, first = [], 0, number + 1
    if batch:
        yield first, batch


def _is_scanned(record: epath.Path) -> bool:
    """Whether the files of a task were read, and are still what they were."""
    if not record.exists():
        return False
    scans = map(FileScan.from_json, read_object(record)['files'])
    return all(state_of(scan.name) == (scan.size, scan.changed) for scan in scans)


def _scan(task: _Scan, tell: Tell, *, preparation: Preparation, work: str) -> dict[str, int]:
    bad = BadRecords(preparation.on_error)
    reading = preparation.sources[task.source].reading
    scans = []
    for number, file in enumerate(task.files, start=task.first):
        tell({'place': file})
        scans.append(scan_file(file, number, reading, preparation.unit_bytes, bad))
    record = epath.Path(work) / task.record
    if record.exists():  # files were touched since; what was made of them must be what they are
        before = map(FileScan.from_json, read_object(record)['files'])
        for was, scan in zip(before, scans, strict=True):
            if was.text_sha256 != scan.text_sha256:
                raise InputError(
                    f'{scan.name} has changed since {preparation.output} was begun: it holds other text of the same '
                    'size; restore it, or write elsewhere'
                )
    write_where_all_meet(record, json.dumps({'files': [dataclasses.asdict(scan) for scan in scans]}))
    return {
        'documents': sum(scan.num_documents for scan in scans),
        'bytes': sum(scan.num_bytes for scan in scans),
    }


# ---- Writing units ---------------------------------------------------------------------------------------------------


def plan_units(preparation: Preparation, scans: Sequence[Sequence[FileScan]]) -> list[_Unit]:
    """The units of all sources, from what was found in their files."""
    tasks = []
    for source, group in enumerate(scans):
        for number, pieces in enumerate(join_pieces(group, preparation.unit_bytes)):
            names = tuple(group[piece.file].name for piece in pieces)
            tasks.append(_Unit(f'unit-{len(tasks):06d}.json', source, number, pieces, names))
    return tasks


def write_all(
    preparation: Preparation, tokenizer: Tokenizer, open_tokenizer: Callable[[str], Tokenizer], work: epath.Path,
    units: Sequence[_Unit], workers: Workers, meeting: Meeting, advance: Callable[[Advance], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Writes every unit; the entries of all machines' units, when they are done."""
    own = _left(units, lambda unit: _is_written(preparation, unit, work), work, meeting)
    _run(
        own,
        functools.partial(
            _write, preparation=preparation, work=os.fspath(work),
            tokenizer=tokenizer if workers.count == 1 else os.fspath(tokenizer.path), open_tokenizer=open_tokenizer,
        ),
        workers,
        Advance('writing', 0, len(own), all_bytes=sum(piece.num_bytes for unit in own for piece in unit.pieces)),
        advance,
    )  # fmt: skip
    _await_records(work, units, meeting)
    return [read_object(work / unit.record) for unit in units]


def _is_written(preparation: Preparation, unit: _Unit, work: epath.Path) -> bool:
    record = work / unit.record
    if not record.exists():
        return False
    folder = preparation.folder(preparation.sources[unit.source])
    for place, entry in _places(folder, read_object(record)):
        file = place / entry['file']
        if (
            not file.exists()
            or file.stat().length != entry['bytes']
            or not (place / origins_file(file.name)).exists()
        ):
            return False
    return True


def _places(folder: epath.Path, entries: dict[str, Any]) -> Iterator[tuple[epath.Path, dict[str, Any]]]:
    for place, name in ((folder, 'train'), (folder / VALIDATION, VALIDATION)):
        if entries[name]:
            yield place, entries[name]


@functools.lru_cache(1)
def _opened(path: str, open_tokenizer: Callable[[str], Tokenizer]) -> Tokenizer:
    return open_tokenizer(path)


def _write(
    task: _Unit, tell: Tell, *, preparation: Preparation, work: str, tokenizer: Tokenizer | str,
    open_tokenizer: Callable[[str], Tokenizer],
) -> dict[str, int]:  # fmt: skip
    num_threads = 0
    if isinstance(tokenizer, str):
        tokenizer, num_threads = _opened(tokenizer, open_tokenizer), 1
    source = preparation.sources[task.source]
    folder = preparation.folder(source)
    for place in (folder, folder / VALIDATION) if preparation.validation_fraction else (folder,):
        place.mkdir(parents=True, exist_ok=True)
    documents = num_bytes = 0

    def read() -> Iterator[tuple[tuple[int, int], str]]:
        for file, piece in zip(task.files, task.pieces, strict=True):
            for record, text in read_piece(file, piece, source.reading):
                yield (piece.file, record), text

    names = {piece.file: file for file, piece in zip(task.files, task.pieces, strict=True)}
    options = (task.number, tokenizer, preparation.seq_len, num_threads)
    with ShardWriter(folder, *options) as train, ShardWriter(folder / VALIDATION, *options) as validation:
        for batch in batches_of(read()):
            file, record = batch[0][0]
            tell({
                'place': f'{names[file]} record {record}', 'documents': documents, 'bytes': num_bytes,
                'tokens': train.num_tokens + validation.num_tokens,
            })  # fmt: skip
            parts = [], []
            for item in batch:
                parts[is_held_out(item[1], preparation.validation_fraction)].append(item)
            for writer, part in zip((train, validation), parts, strict=True):
                if part:
                    writer.add([text for _, text in part], (origin for origin, _ in part))
            documents += len(batch)
            num_bytes += sum(size_of(text) for _, text in batch)
        entries = {'train': train.finish(), VALIDATION: validation.finish()}
        lengths = {'train': train.lengths(), VALIDATION: validation.lengths()}
        tokens = train.num_tokens + validation.num_tokens
    write_where_all_meet(
        epath.Path(work) / task.record, json.dumps(entries | {'source': task.source, 'lengths': lengths})
    )
    return {'documents': documents, 'bytes': num_bytes, 'tokens': tokens}


# ---- Both ------------------------------------------------------------------------------------------------------------


def _run(
    tasks: Sequence[Any], work: Callable[[Any, Tell], Any], workers: Workers, state: Advance,
    advance: Callable[[Advance], None], count_of: Callable[[Any], int] = lambda task: 1,
) -> None:  # fmt: skip
    finished = {'documents': 0, 'bytes': 0, 'tokens': 0}
    under_way: dict[str, dict[str, int]] = {}
    count = 0

    def say() -> None:
        total = {
            key: finished[key] + sum(part.get(key, 0) for part in under_way.values()) for key in finished
        }
        advance(dataclasses.replace(
            state, done=count, documents=total['documents'], num_bytes=total['bytes'], tokens=total['tokens'],
        ))  # fmt: skip

    def told(task: Any, message: dict[str, Any]) -> None:
        under_way[task.record] = message
        say()

    def done(task: Any, result: dict[str, int]) -> None:
        nonlocal count
        count += count_of(task)
        under_way.pop(task.record, None)
        for key, value in result.items():
            finished[key] += value
        say()

    def describe(task: Any, message: dict[str, Any] | None) -> str:
        what = f'unit {task.number}, ' if isinstance(task, _Unit) else ''
        return what + (message['place'] if message else task.files[0])

    workers.run(tasks, work, done=done, told=told, describe=describe)


def _left(
    tasks: Sequence[Any], is_done: Callable[[Any], bool], work: epath.Path, meeting: Meeting
) -> list[Any]:
    """This machine's tasks without a record.

    Raises:
      FileNotFoundError: there are no records any more.
    """
    own = [task for task in meeting.machine.share(tasks) if not is_done(task)]
    (work / BEGUN).stat()  # goes before any record does
    return own


def _await_records(work: epath.Path, tasks: Sequence[Any], meeting: Meeting) -> None:
    count = meeting.machine.count
    if count == 1:
        return
    missing = list(enumerate(tasks))

    def all_there() -> bool:
        nonlocal missing
        if missing:
            names = {file.name for file in work.iterdir()}
            missing = [(number, task) for number, task in missing if task.record not in names]
        return not missing

    meeting.wait(all_there, lambda: f'machines {sorted({number % count for number, _ in missing})}')
