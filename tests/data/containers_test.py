"""The same documents in every container, from every place; what is wrong with a record, and what with a file."""

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pytest

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.preparation import Preparation, TextSource
from llama_jax.data.prepare import prepare
from llama_jax.data.sources import Reading, list_files, read_documents, read_file
from llama_jax.errors import InputError
from tests.data.packing_test import Letters


def texts(count=200, seed=0):
    rng = np.random.default_rng(seed)
    letters = np.array(list('abcdefgh é\n中"\\'))
    return [''.join(rng.choice(letters, rng.integers(1, 60))) + 'x' for _ in range(count)]


def as_lines(documents):
    return [json.dumps({'id': i, 'text': text}).encode() + b'\n' for i, text in enumerate(documents)]


def frame(data, **parameters):
    import zstandard

    made = zstandard.ZstdCompressionParameters.from_level(1, **parameters)
    return zstandard.ZstdCompressor(compression_params=made).compress(data)


def write_all(folder, documents):
    """The documents in every container, by name of the file."""
    import pyarrow
    from array_record.python import array_record_module
    from pyarrow import ipc, parquet

    lines = as_lines(documents)
    half, whole = len(lines) // 2, b''.join(lines)
    first, second = b''.join(lines[:half]) + lines[half][:7], lines[half][7:] + b''.join(lines[half + 1 :])
    plain = {
        'a.jsonl': whole,
        'crlf.jsonl': b'\xef\xbb\xbf' + whole.replace(b'\n', b'\r\n\r\n'),
        'array.json': b'[' + b','.join(lines) + b']',
        'members.jsonl.gz': gzip.compress(first) + gzip.compress(second),
        'frames.jsonl.zst': frame(first) + frame(second),
        'window.jsonl.zst': frame(whole, window_log=28, enable_ldm=True),
        'a.jsonl.bz2': bz2.compress(first) + bz2.compress(second),
        'a.jsonl.xz': lzma.compress(whole),
        'a.txt': '<|end|>'.join(documents).encode(),
    }
    for name, data in plain.items():
        (folder / name).write_bytes(data)
    table = pyarrow.table({'id': list(range(len(documents))), 'text': documents})
    large = table.set_column(1, 'text', table['text'].cast(pyarrow.large_string()))
    parquet.write_table(table, folder / 'a.parquet', row_group_size=33)
    parquet.write_table(large, folder / 'large.parquet')
    with ipc.new_stream(str(folder / 'stream.arrow'), table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    with ipc.new_file(str(folder / 'file.arrow'), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    writer = array_record_module.ArrayRecordWriter(str(folder / 'a.array_record'), 'group_size:1')
    for text in documents:
        writer.write(text.encode())
    writer.close()
    return sorted(path.name for path in folder.iterdir())


def test_the_same_documents_are_in_every_container_and_from_every_place(tmp_path):
    documents = texts()
    names, reading = write_all(tmp_path, documents), Reading(separator='<|end|>')
    assert len(names) == 14
    for name in names:
        records = list(read_file(str(tmp_path / name), reading))
        # What a text file is cut by takes the line ends beside it.
        wanted = [text.strip('\n') for text in documents] if name == 'a.txt' else documents
        assert [record.content for record in records] == wanted, name
        for index in (1, 32, 33, 71, len(records) - 1):
            assert list(read_file(str(tmp_path / name), reading, records[index].place)) == records[index:]


def write_tfds(folder, documents):
    """The source that reads the documents as a TFDS data set."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Kept(tfds.core.GeneratorBasedBuilder):
            VERSION, code_path = tfds.core.Version('1.0.0'), None

            def _info(self):
                fields = tfds.features.FeaturesDict({'text': tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=fields, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {'train': ((number, {'text': text}) for number, text in enumerate(documents))}

            def _generate_examples(self):
                raise NotImplementedError

        Kept(data_dir=folder, file_format='array_record').download_and_prepare()
    return f'tfds:kept@{folder}'


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # TFDS warns of what it uses itself
def test_five_hundred_documents_have_one_fingerprint_whatever_holds_them(tmp_path):
    documents, folder = [text.strip('\n') for text in texts(500)], tmp_path / 'files'
    folder.mkdir()
    sources = [f'{folder}/{name}' for name in write_all(folder, documents)]
    sources.append(write_tfds(tmp_path / 'tfds', documents))
    found = {}
    for number, source in enumerate(sources):
        asked = TextSource('s', (source,), Reading(separator='<|end|>'))
        report = prepare(Preparation(f'{tmp_path}/{number}', (asked,), 64, unit_bytes=4000), Letters())
        row = report['sources']['s']['train']
        found[source] = row['fingerprint'], row['documents'], row['shards']
    assert len(sources) == 15 and len(set(found.values())) == 1, found
    assert next(iter(found.values()))[1:] == (500, 5)


def test_a_file_that_is_cut_short_is_no_bad_record(tmp_path):
    documents = texts(2000)
    for name in write_all(tmp_path, documents):
        if name in ('a.jsonl', 'crlf.jsonl', 'a.txt'):
            continue  # of these nothing tells
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(InputError, match='cut short') as caught:
            list(read_documents(str(path), bad=BadRecords('skip')))
        assert str(path) in str(caught.value) and '\n' not in str(caught.value)


NO_TEXT = {
    'no JSON': (b'{"text": ', 'is not JSON'),
    'a NUL': (b'{"text": "a\x00b"}', 'is not JSON'),
    'no UTF-8': (b'{"text": "\xff"}', 'is not UTF-8: byte 0xff'),
    'UTF-16': (json.dumps({'text': 'a'}).encode('utf-16'), 'is not UTF-8'),
    'an array': (b'["a"]', 'holds a JSON list'),
    'a text': (b'"a"', 'holds a JSON str'),
    'a number': (b'3', 'holds a JSON int'),
    'null': (b'{"text": null}', "field 'text' is NoneType"),
    'no field': (b'{"body": "a", "id": 3}', "has no field 'text': its fields are body, id"),
    'a number for a text': (b'{"text": 3}', "field 'text' is int"),
    'a list for a text': (b'{"text": ["a"]}', "field 'text' is list"),
    'an object for a text': (b'{"text": {"a": "b"}}', "field 'text' is dict"),
    'deep nesting': (b'[' * 100_000, 'is not JSON'),
    'two objects': (b'{"text": "a"} {"text": "b"}', 'is not JSON'),
    'a huge number': (b'{"text": "a", "n": ' + b'9' * 5000 + b'}', 'is not JSON'),
}


@pytest.mark.parametrize('case', NO_TEXT)
def test_a_record_without_text_stops_or_is_counted_and_the_rest_is_read(tmp_path, case):
    line, message = NO_TEXT[case]
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'{"text": "first"}\n' + b'\n'.join([line] * 7) + b'\n\n{"text": "last"}')
    with pytest.raises(InputError, match=f'line 2[: ].*{message}|line 2 {message}') as caught:
        list(read_documents(str(path)))
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)
    bad = BadRecords('skip')
    assert list(read_documents(str(path), bad=bad)) == ['first', 'last']
    assert bad.count == 7 and len(bad.named) == 5 and f'{path} line 6' in bad.named[-1]


def test_a_line_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    from llama_jax.data import containers

    monkeypatch.setattr(containers, 'MAX_BYTES', 1 << 16)
    path = tmp_path / 'a.jsonl.gz'
    path.write_bytes(gzip.compress(b'{"text": "%s"}\n{"text": "last"}\n' % (b'a' * (3 << 20))))
    bad = BadRecords('skip')
    assert list(read_documents(str(path), bad=bad)) == ['last']
    assert bad.named == [f'{path} line 1 has more than 0 MiB; cut it into several']
    records = list(read_file(str(path), Reading()))
    assert list(read_file(str(path), Reading(), records[1].place)) == records[1:]


def test_a_text_is_found_at_a_path_of_keys(tmp_path):
    from pyarrow import Table, parquet

    rows = [{'data': {'text': f'{i}', 'more': i}, 'url': 'u'} for i in range(5)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    parquet.write_table(Table.from_pylist(rows), tmp_path / 'a.parquet')
    for name in ('a.jsonl', 'a.parquet'):
        assert list(read_documents(str(tmp_path / name), text_key='data.text')) == list('01234')
        with pytest.raises(InputError, match="has no field 'text': its fields are data, url"):
            list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize('name', ['a.csv', 'a.html', 'a.jsonl.zip', 'a.bin.zst', 'a.parquet.gz.7z'])
def test_what_is_of_no_known_kind_is_refused_with_those_that_are(tmp_path, name):
    (tmp_path / name).write_text('a')
    with pytest.raises(InputError, match=r'is of no known kind; they are \.jsonl .* \.parquet'):
        list_files(str(tmp_path / '*'))


def test_without_permission_it_is_said(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('a')

    def refuse(*args, **kwargs):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr('etils.epath.backend._OsPathBackend.open', refuse)
    with pytest.raises(InputError, match=r'cannot read .*a\.txt: Permission denied'):
        list(read_documents(str(tmp_path / 'a.txt')))
