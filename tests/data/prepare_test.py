"""The same bytes however many do it and wherever they are killed; what became of every document."""

import bz2
import dataclasses
import gzip
import json
import os
import pathlib
import threading

import hypothesis
import numpy as np
import pytest
from etils import epath
from hypothesis import strategies

from llama_jax.data import meeting, unit_tasks
from llama_jax.data import prepare as prepare_module
from llama_jax.data.bad_records import BadRecords
from llama_jax.data.lm_batch import lm_batch
from llama_jax.data.packing import PackedRows, tokenize_units
from llama_jax.data.preparation import Machine, Preparation, TextSource
from llama_jax.data.prepare import WORK, prepare
from llama_jax.data.prepared import PreparedRows
from llama_jax.data.shards import read_origins
from llama_jax.data.sources import Reading, read_documents, read_file
from llama_jax.data.units import is_held_out, join_pieces, read_units, scan_file
from llama_jax.errors import InputError
from tests.data.packing_test import Letters, documents

SLOW = pytest.mark.slow
UNIT = 1500  # bytes of text, of documents that have 20 each


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    """Four sources, some 40 units; some records are bad, some empty."""
    folder = tmp_path_factory.mktemp('raw')
    for number in range(3):
        lines = [json.dumps({'text': text, 'n': i}) for i, text in enumerate(documents(300, seed=number))]
        lines[7], lines[50:52] = '{"text": ""}', ['', '{"text": null}']
        (folder / f'a{number}.jsonl.gz').write_bytes(gzip.compress('\n'.join(lines).encode()))
    for number in range(9):  # files that are less than a unit
        (folder / f'small{number}.txt').write_text('|'.join(documents(20, seed=10 + number)))
    (folder / 'b.jsonl.bz2').write_bytes(
        bz2.compress(
            '\n'.join(json.dumps({'body': {'text': text}}) for text in documents(900, seed=4)).encode()
        )
    )
    (folder / 'c.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in documents(300, seed=5)))
    return folder


def asked(raw, output, **changed):
    sources = (
        TextSource('a', (f'{raw}/a*.gz',)),
        TextSource('small', (f'{raw}/small*.txt',), Reading(separator='|')),
        TextSource('b', (f'{raw}/b.*',), Reading(text_key='body.text')),
        TextSource('c', (f'{raw}/c.jsonl',)),
    )
    options = {'unit_bytes': UNIT, 'validation_fraction': 0.05, 'on_error': 'skip'} | changed
    return Preparation(str(output), **{'sources': sources, 'seq_len': 32} | options)


def contents(folder):
    return {
        os.path.relpath(os.path.join(above, name), folder): (pathlib.Path(above) / name).read_bytes()
        for above, _, names in os.walk(folder)
        for name in names
    }


@pytest.fixture(scope='module')
def once(raw, tmp_path_factory):
    """(the folder, the report) of one process that nobody disturbs."""
    output = tmp_path_factory.mktemp('once') / 'data'
    return output, prepare(asked(raw, output), Letters(), draw=lambda report: b'picture')


def test_every_record_is_accounted_for(raw, once):
    output, report = once
    assert list(report['sources']) == ['a', 'small', 'b', 'c']
    row = report['sources']['a']
    assert (row['records'], row['bad'], row['empty']) == (3 * 299, 3, 3)
    assert row['bad_first'][0] == f"{raw}/a0.jsonl.gz line 52: field 'text' is NoneType, not text"
    for row in report['sources'].values():
        kept = row['train']['documents'] + row['validation']['documents']
        assert (
            row['records'] == row['bad'] + row['empty'] + kept
            and row['held_out'] == row['validation']['documents']
        )
        for part in ('train', 'validation'):
            assert sum(row[part]['lengths']) == row[part]['documents']
    assert sum(row['units'] for row in report['sources'].values()) > 30
    assert json.loads((output / 'report.json').read_text()) == report
    assert (output / 'report.png').read_bytes() == b'picture'
    assert sorted(path.name for path in output.iterdir()) == [
        'a',
        'b',
        'c',
        'report.json',
        'report.png',
        'small',
    ]
    assert not [name for name in contents(output) if 'partial' in name]
    manifest = PreparedRows(output / 'a').manifest
    assert manifest['filters'] == {'bad': 3, 'empty': 3, 'held_out': report['sources']['a']['held_out']}
    assert [os.path.basename(file['name']) for file in manifest['files']] == [
        f'a{i}.jsonl.gz' for i in range(3)
    ]


def test_what_is_held_out_is_told_by_its_text_alone(raw, once, tmp_path):
    output, _ = once
    trained, validated = (
        {Letters().decode(ids) for name in ('a', 'b', 'c', 'small') for ids in stream(output / name / part)}
        for part in ('', 'validation')
    )
    assert not trained & validated and 30 < len(validated) < 150
    assert trained | validated == {
        text for source in asked(raw, '').sources for file in source.inputs
        for text in read_documents(
            file, text_key=source.reading.text_key, separator=source.reading.separator, bad=BadRecords('skip')
        )
    }  # fmt: skip


def stream(folder):
    """Ids of every document of a folder, put together from rows."""
    rows = PreparedRows(folder)
    unit, ids, found = None, [], []
    for index, row in enumerate(rows):
        if rows.find(index)[0] != unit:  # the first row of a unit shares no token with the one before
            unit, ids = rows.find(index)[0], []
            found.append(ids)
        length = int(np.sum(row['segment_ids'] > 0))
        ids += row['tokens'][len(ids) > 0 : length].tolist()
    return [[0, *document] for ids in found for document in ' '.join(map(str, ids)).split() and split(ids)]


def split(ids):
    """A stream cut behind every EOS, without the BOS."""
    parts, part = [], []
    for token in ids:
        part.append(token)
        if token == 1:
            parts.append(part[1:])
            part = []
    assert not part
    return parts


def test_every_token_is_traced_to_its_record(raw, once):
    output, _ = once
    for name in ('a', 'b', 'small'):
        rows = PreparedRows(output / name)
        reading = next(source.reading for source in asked(raw, '').sources if source.name == name)
        found = stream(output / name)
        origins = [read_origins(epath.Path(output / name), shard) for shard in rows.manifest['shards']]
        assert sum(map(len, origins)) == len(found)
        files = [file['name'] for file in rows.manifest['files']]
        texts = {
            (number, record.place.number): record.content
            for number, file in enumerate(files)
            for record in read_file(file, reading)
        }
        for ids, (file, record, _) in zip(found, np.concatenate(origins), strict=True):
            assert ids == Letters().encode(texts[file, record], True, True)


def test_three_machines_write_the_same_bytes(raw, once, tmp_path, monkeypatch):
    monkeypatch.setattr(meeting, '_SECONDS_BETWEEN_LOOKS', 0.01)
    output, reports = tmp_path / 'data', [None] * 3

    def one(index):
        reports[index] = prepare(
            asked(raw, output), Letters(), machine=Machine(index, 3), draw=lambda report: b'picture'
        )

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert reports == [once[1]] * 3
    assert contents(output) == contents(once[0])


class Killed(BaseException):
    pass


def test_killed_at_any_task_it_goes_on_and_does_nothing_twice(raw, once, tmp_path, monkeypatch):
    output, rng, written = tmp_path / 'data', np.random.default_rng(0), []
    write = unit_tasks._write

    def counted(task, *args, **kwargs):
        written.append(task.record)
        return write(task, *args, **kwargs)

    monkeypatch.setattr(unit_tasks, '_write', counted)
    kills = 0
    while kills < 100:
        left = rng.integers(1, 12)

        def kill(state):
            nonlocal left
            left -= 1
            if not left:
                raise Killed

        try:
            prepare(asked(raw, output), Letters(), advance=kill, draw=lambda report: b'picture')
            break
        except Killed:
            kills += 1
            assert (output / WORK).is_dir() and not list(output.rglob('manifest.json'))
    assert kills > 5 and contents(output) == contents(once[0])
    units = sum(row['units'] for row in once[1]['sources'].values())
    assert units == len(set(written)) and len(written) - units <= kills


@pytest.mark.parametrize(
    'left', [0, pytest.param(1, marks=SLOW), 2, *(pytest.param(i, marks=SLOW) for i in (3, 4, 5))]
)
def test_killed_while_it_finishes_it_finishes_again(raw, once, tmp_path, monkeypatch, left):
    output, write = tmp_path / 'data', prepare_module.write_atomically

    def kill(path, data):
        nonlocal left
        if path.name != 'config.json':
            left -= 1
        if left < 0:
            raise Killed
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, 'write_atomically', kill)
        patch.setattr('llama_jax.data.shards.write_atomically', kill if left > 1 else write)
        with pytest.raises(Killed):
            prepare(asked(raw, output), Letters(), draw=lambda report: b'picture')
    prepare(asked(raw, output), Letters(), draw=lambda report: b'picture')
    assert contents(output) == contents(once[0])


def refused(preparation, kind=InputError, **options):
    with pytest.raises(kind) as caught:
        prepare(preparation, Letters(), **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_another_preparation_is_refused_by_what_is_different(raw, once, tmp_path):
    output = tmp_path / 'data'

    def kill(state):
        if state.stage == 'writing' and state.done == 3:
            raise Killed

    files = tmp_path / 'raw'
    files.mkdir()
    for file in raw.iterdir():
        (files / file.name).write_bytes(file.read_bytes())
    with pytest.raises(Killed):
        prepare(asked(files, output), Letters(), advance=kill)
    assert 'begun with another seq_len: 32, now 16; restore it' in refused(asked(files, output, seq_len=16))
    assert 'another unit_bytes: 1500, now 1501' in refused(asked(files, output, unit_bytes=1501))
    assert 'another validation_fraction' in refused(asked(files, output, validation_fraction=0.1))
    with pytest.raises(InputError, match='begun with another tokenizer'):
        prepare(asked(files, output), Letters(sha256='other'))
    assert 'another sources' in refused(asked(files, output, sources=asked(files, output).sources[1:]))
    changed = files / 'c.jsonl'
    content = changed.read_bytes()
    changed.write_bytes(content + b' ')
    assert (
        f'{changed} has changed since {output} was begun: it was {len(content)} bytes, now {len(content) + 1}'
        in (refused(asked(files, output)))
    )
    changed.write_bytes(content.replace(b'a', b'b', 1))
    os.utime(changed, (1, 1))
    assert f'{changed} has changed since {output} was begun: it holds other text' in refused(
        asked(files, output)
    )
    changed.write_bytes(content)  # touched, and the same
    (files / 'c2.jsonl').write_bytes(content)
    (files / 'a3.jsonl.gz').write_bytes(gzip.compress(content))
    assert 'a3.jsonl.gz has changed' in refused(asked(files, output))
    (files / 'a3.jsonl.gz').unlink()
    prepare(asked(files, output), Letters())
    assert 'already holds prepared data' in refused(asked(files, output))


def test_what_is_wrong_leaves_nothing(raw, tmp_path, monkeypatch):
    output = tmp_path / 'data'
    assert f"{raw}/a0.jsonl.gz line 52: field 'text' is NoneType, not text; mend it, or leave" in refused(
        asked(raw, output, on_error='stop')
    )
    assert not output.exists()
    assert '3 records have no text, and max_errors is 2' in refused(asked(raw, output, max_errors=2))
    prepare(asked(raw, output, max_errors=3), Letters())  # goes on with what it has read
    other = tmp_path / 'other'
    twice = dataclasses.replace(
        asked(raw, other).sources[3], inputs=(f'{raw}/c.jsonl', f'{raw}/../{raw.name}/c*')
    )
    assert 'c.jsonl is named twice, by' in refused(asked(raw, other, sources=(twice,)))
    sources = asked(raw, other).sources
    assert 'is in two sources' in refused(
        asked(raw, other, sources=(*sources, TextSource('d', (f'{raw}/../{raw.name}/c.jsonl',))))
    )
    new = TextSource('d', sources[3].inputs)
    assert 'holds what was prepared before, and its report' in refused(
        asked(raw, output, sources=(new, TextSource('e', sources[2].inputs)))
    )
    for changed, line in [
        ({'seq_len': 0}, 'seq_len is 0'), ({'unit_bytes': 0}, 'unit_bytes is 0'), ({'on_error': 'go'}, "'go'"),
        ({'validation_fraction': 1.0}, 'validation_fraction is 1.0'), ({'max_errors': -1}, 'max_errors is -1'),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=line):
            asked(raw, other, **changed)
    with pytest.raises(InputError, match='shard_index is 3; of 3 machines it is 0 to 2'):
        Machine(3, 3)
    assert 'all documents are held out' in refused(asked(raw, other, validation_fraction=1 - 1e-9))
    assert not other.exists() or list(other.rglob('manifest.json')) == []


def test_a_file_that_changes_while_it_is_read_is_named(raw, tmp_path, monkeypatch):
    file = tmp_path / 'c.jsonl'
    file.write_bytes((raw / 'c.jsonl').read_bytes())
    source = TextSource('c', (str(file),))
    plan = prepare_module.plan_units

    def change(*args):
        file.write_bytes(file.read_bytes()[:-40] + b'\n')
        return plan(*args)

    monkeypatch.setattr(prepare_module, 'plan_units', change)
    assert f'{file} has changed since it was scanned' in refused(
        asked(raw, tmp_path / 'o', sources=(source,))
    )


def test_in_memory_is_cut_as_what_is_prepared(raw, once):
    """But for the first document of a source, which always trains there."""
    output, _ = once
    for source in asked(raw, '').sources:
        if source.name == 'small':
            continue
        (files,) = source.inputs
        documents = read_units(files, source.reading, UNIT, BadRecords('skip'))
        kept = ((unit, text) for unit, text in documents if not is_held_out(text, 0.05))
        in_memory, prepared = (
            PackedRows(tokenize_units(kept, Letters()), 32),
            PreparedRows(output / source.name),
        )
        assert in_memory.fingerprint == prepared.fingerprint and len(in_memory) == len(prepared)
        for index in range(0, len(prepared), 7):
            np.testing.assert_array_equal(in_memory[index]['tokens'], prepared[index]['tokens'])
            np.testing.assert_array_equal(in_memory[index]['segment_ids'], prepared[index]['segment_ids'])


lengths = strategies.lists(
    strategies.lists(strategies.integers(0, 60) | strategies.just(5000), max_size=12), max_size=5
)


@hypothesis.settings(max_examples=25, deadline=None, database=None)
@hypothesis.given(lengths, strategies.integers(1, 700), strategies.sampled_from([1, 30, 100, 2000, 1 << 20]))
@hypothesis.example([[40], [60, 50, 50]], 100, 100)  # a file that goes on with the unit of the last
def test_nothing_is_lost_and_nothing_invented(tmp_path_factory, files, seq_len, unit_bytes):
    folder = tmp_path_factory.mktemp('files')
    rng = np.random.default_rng(0)
    texts = [[''.join(map(chr, rng.integers(97, 123, size))) for size in sizes] for sizes in files]
    for number, group in enumerate(texts):
        (folder / f'{number}.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in group))
    wanted = [text for group in texts for text in group if text]
    hypothesis.assume(wanted and sum(map(len, wanted)) < 2000 * seq_len)
    # The units of files read one by one are those of one pass over all.
    reading = Reading()
    scans = [
        scan_file(str(folder / f'{number}.jsonl'), number, reading, unit_bytes, BadRecords())
        for number in range(len(texts))
    ]
    units = list(read_units(str(folder / '*.jsonl'), reading, unit_bytes))
    assert [text for _, text in units] == wanted
    joined = join_pieces(scans, unit_bytes)
    counts = [sum(piece.num_documents for piece in pieces) for pieces in joined]
    assert counts == np.bincount([unit for unit, _ in units]).tolist()
    if unit_bytes == 1:
        assert counts == [1] * len(wanted)
    # Their rows, put together, are BOS document EOS, and every token but BOS is a target once.
    rows = PackedRows(tokenize_units(units, Letters()), seq_len)
    batch = lm_batch(*(np.stack([row[name] for row in rows]) for name in ('tokens', 'segment_ids')))
    stream = [Letters().encode(text, True, True) for text in wanted]
    np.testing.assert_array_equal(
        batch.targets[batch.loss_mask], np.concatenate(stream)[np.concatenate(stream) != 0]
    )
    np.testing.assert_array_equal(batch.positions[:, 0], 0)
    continued = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    np.testing.assert_array_equal(batch.positions[:, 1:], np.where(continued, batch.positions[:, :-1] + 1, 0))
    assert len(rows) <= sum(map(len, stream)) // seq_len + len(counts)
