"""Text sources to folders of packed rows: in any number of processes and machines, killed anywhere, the same bytes.

    OUTPUT/SOURCE/rows-00000.array_record ...      of several sources; of a single one OUTPUT itself
    OUTPUT/SOURCE/documents-00000.npy.zst ...      where each document of a shard came from
    OUTPUT/SOURCE/manifest.json                    written last
    OUTPUT/SOURCE/validation/                      the same of what is held out
    OUTPUT/report.json
    OUTPUT/preparation.partial/                    what is done so far; goes at the end

First every file is read once, which tells where units begin and what is wrong with records; then every unit is read
again, tokenised, packed and written. Both leave a record for each finished task, and a task with a record is done.
"""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from llama_jax.data.meeting import BEGUN, Meeting
from llama_jax.data.preparation import ALONE, Advance, Machine, Preparation
from llama_jax.data.prepared import MANIFEST, VALIDATION
from llama_jax.data.shards import Shape, write_manifest
from llama_jax.data.unit_tasks import plan_units, scan_all, write_all
from llama_jax.data.units import FileScan, list_inputs, place_of, state_of
from llama_jax.data.workers import Workers
from llama_jax.errors import InputError
from llama_jax.json_file import read_object
from llama_jax.storage import enable_bucket, write_atomically
from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

WORK = 'preparation.partial'
REPORT = 'report.json'

_log = logging.getLogger(__name__)


def prepare(
    preparation: Preparation,
    tokenizer: Tokenizer,
    *,
    num_workers: int = 1,
    machine: Machine = ALONE,
    open_tokenizer: Callable[[str], Tokenizer] = load_tokenizer,
    advance: Callable[[Advance], None] = lambda advance: None,
    draw: Callable[[dict[str, Any]], bytes] | None = None,
) -> dict[str, Any]:
    """Prepares all sources, or goes on with what was begun; the bytes of the output are the same however it is done.

    Args:
      preparation: what is prepared.
      tokenizer: gives the ids.
      num_workers: processes on this machine.
      machine: which of several this is; all are given the same preparation, and return when all is done.
      open_tokenizer: by which each of several workers opens it again, from its file; a function of a module.
      advance: called now and then.
      draw: the report -> its picture (PNG), written beside it.

    Returns:
      The report: what became of every record.

    Raises:
      InputError: a file or record cannot be read; or what was begun in the folder is another preparation.
      SystemFailure: the disk is full, or a worker died twice at one task.
    """
    enable_bucket(preparation.output)
    work, report = epath.Path(preparation.output) / WORK, epath.Path(preparation.output) / REPORT
    meeting = Meeting(work, machine)
    with meeting.told():
        files = [list_inputs(source.inputs) for source in preparation.sources]
        _check_once(files)
        _begin(preparation, tokenizer, files, meeting, work)
        try:
            with Workers(num_workers) as workers:
                scans = scan_all(preparation, work, files, workers, meeting, advance)
                units = plan_units(preparation, scans)
                entries = write_all(
                    preparation, tokenizer, open_tokenizer, work, units, workers, meeting, advance
                )
            if not machine.index:
                return _finish(preparation, tokenizer, work, scans, entries, draw)
            meeting.wait(lambda: not (work / BEGUN).exists(), 'machine 0 to write the manifests')
        except BaseException as error:
            # Machine 0 takes the records away as soon as it has seen the last one: one that looks later misses them.
            missed = isinstance(error, FileNotFoundError | InputError) and not (work / BEGUN).exists()
            if machine.index and missed and report.exists():
                return read_object(report)
            if machine.count == 1 and not any(work.glob('scan-*.json')):  # nothing came of it
                _remove(work, preparation)
            raise
    return read_object(report)


def _check_once(files: Sequence[Sequence[str]]) -> None:
    seen: dict[str, int] = {}
    for source, names in enumerate(files):
        for name in names:
            if seen.setdefault(place_of(name), source) != source:
                raise InputError(f'{name} is in two sources; its documents would count twice')


def _begin(
    preparation: Preparation, tokenizer: Tokenizer, files: Sequence[Sequence[str]], meeting: Meeting,
    work: epath.Path,
) -> None:  # fmt: skip
    """Makes the folder of records; refuses one of another preparation, and an output that is finished.

    Machine 0 makes it, and the others wait for that.
    """
    output = epath.Path(preparation.output)
    now: dict[str, Any] = {
        'seq_len': preparation.seq_len,
        'unit_bytes': preparation.unit_bytes,
        'validation_fraction': preparation.validation_fraction,
        'tokenizer': tokenizer.sha256,
        'sources': [dataclasses.asdict(source) for source in preparation.sources],
        'files': [[[name, state_of(name)[0]] for name in names] for names in files],
    }
    now = json.loads(json.dumps(now))

    def has_begun() -> bool:
        # What refuses machine 0 refuses this one too; all else is written when there is a record.
        refused = _what_is_there(preparation)
        if not (work / BEGUN).exists():
            if refused:
                raise InputError(refused)
            return False
        return True

    if meeting.machine.index:
        meeting.wait(has_begun, 'machine 0 to begin')
    if (work / BEGUN).exists():
        _compare(read_object(work / BEGUN), now, preparation.output)
        _log.info('%s: going on with what was begun', preparation.output)
        return
    if (output / REPORT).exists():  # killed at the last moment
        work.rmtree(missing_ok=True)
    if refused := _what_is_there(preparation):
        raise InputError(refused)
    write_atomically(work / BEGUN, json.dumps(now))


def _what_is_there(preparation: Preparation) -> str:
    """What of the output does not let it be written; '' where nothing."""
    for source in preparation.sources:
        folder = preparation.folder(source)
        if (folder / MANIFEST).exists():
            return f'{folder} already holds prepared data; delete it or write elsewhere'
        if folder.exists() and any(file.name != WORK for file in folder.iterdir()):
            return f'{folder} exists and is not empty; delete it or write elsewhere'
    if (epath.Path(preparation.output) / REPORT).exists():
        return f'{preparation.output} holds what was prepared before, and its report; write elsewhere'
    return ''


def _compare(before: dict[str, Any], now: dict[str, Any], output: str) -> None:
    for key in now:
        if key == 'files' or before.get(key) == now[key]:
            continue
        raise InputError(
            f'{output} was begun with another {key}: {_brief(before.get(key))}, now {_brief(now[key])}; restore it, '
            f'delete {output}, or write elsewhere'
        )
    for old, new in zip(before['files'], now['files'], strict=True):
        was, found = dict(map(tuple, old)), dict(map(tuple, new))
        for name in sorted(was.keys() | found.keys()):
            if was.get(name) != found.get(name):
                sizes = [
                    f'{size} bytes' if size is not None else 'not there'
                    for size in (was.get(name), found.get(name))
                ]
                raise InputError(
                    f'{name} has changed since {output} was begun: it was {sizes[0]}, now {sizes[1]}; restore it, '
                    f'delete {output}, or write elsewhere'
                )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f'{text[:200]}...'


def _finish(
    preparation: Preparation, tokenizer: Tokenizer, work: epath.Path, scans: Sequence[Sequence[FileScan]],
    entries: Sequence[dict[str, Any]], draw: Callable[[dict[str, Any]], bytes] | None,
) -> dict[str, Any]:  # fmt: skip
    """Manifests, report, and no trace of the work."""
    shape = Shape(tokenizer, preparation.seq_len, preparation.unit_bytes)
    report: dict[str, Any] = {'seq_len': preparation.seq_len, 'sources': {}}
    for number, source in enumerate(preparation.sources):
        folder = preparation.folder(source)
        own = [entry for entry in entries if entry['source'] == number]
        parts = {name: [entry[name] for entry in own if entry[name]] for name in (VALIDATION, 'train')}
        if not parts['train']:
            raise InputError(
                f'{source.name}: all documents are held out at validation_fraction {preparation.validation_fraction}; '
                'lower it, or give more text'
            )
        files = [
            {'name': scan.name, 'bytes': scan.size, 'documents': scan.num_documents, 'text_bytes': scan.num_bytes,
             'text_sha256': scan.text_sha256, 'empty': scan.num_empty, 'bad': scan.num_bad}
            for scan in scans[number]
        ]  # fmt: skip
        held_out = sum(entry['documents'] for entry in parts[VALIDATION])
        filters = {name: sum(file[name] for file in files) for name in ('bad', 'empty')} | {
            'held_out': held_out
        }
        first = {
            'bad_first': [line for scan in scans[number] for line in scan.bad][:5],
            'empty_first': [line for scan in scans[number] for line in scan.empty][:5],
        }
        described = {
            'source': dataclasses.asdict(source), 'validation_fraction': preparation.validation_fraction,
            'filters': filters, **first, 'files': files,
        }  # fmt: skip
        row: dict[str, Any] = {
            'files': len(files),
            'file_bytes': sum(file['bytes'] for file in files),
            'records': sum(file['documents'] for file in files) + filters['bad'] + filters['empty'],
            **filters,
            **first,
            'units': len(own),
        }
        for name, shards in parts.items():
            place = folder / VALIDATION if name == VALIDATION else folder
            for stale in place.glob('.*.partial') if place.exists() else ():  # of a process that was killed
                stale.unlink()
            if not shards:
                if place.exists() and '://' not in os.fspath(place):
                    os.rmdir(place)
                continue
            manifest = write_manifest(place, shards, shape, part=name, **described)
            row[name] = {
                'documents': manifest['num_documents'], 'tokens': manifest['num_tokens'],
                'rows': manifest['num_rows'], 'text_bytes': manifest['num_bytes'],
                'shards': len(shards), 'fingerprint': manifest['fingerprint'],
                'lengths': [sum(column) for column in zip(*(entry['lengths'][name] for entry in own), strict=True)],
            }  # fmt: skip
        report['sources'][source.name] = row
    output = epath.Path(preparation.output)
    if draw:
        write_atomically(output / 'report.png', draw(report))
    write_atomically(output / REPORT, json.dumps(report, indent=1) + '\n')
    _remove(work, preparation)
    return report


def _remove(work: epath.Path, preparation: Preparation) -> None:
    (work / BEGUN).unlink(missing_ok=True)  # what the others look for
    for is_last in [False] * 9 + [True]:
        try:
            work.rmtree(missing_ok=True)
            break
        except OSError:  # of a machine that looked just before, a file has come or gone
            if is_last:
                raise
            time.sleep(0.1)
    output = epath.Path(preparation.output)
    if '://' not in preparation.output and output.exists() and not any(output.iterdir()):
        os.rmdir(output)
