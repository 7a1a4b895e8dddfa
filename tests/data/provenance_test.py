"""Every token of a prepared row is that of the record that is named, at the place that is named."""

import json

import numpy as np
import pytest

from llama_jax.data.preparation import Preparation, TextSource
from llama_jax.data.prepare import prepare
from llama_jax.data.prepared import PreparedRows
from llama_jax.data.provenance import (
    document_lengths,
    find_copies,
    passages_of,
    read_stream,
    read_text,
    reading_of,
)
from llama_jax.data.shards import write_prepared
from llama_jax.errors import InputError
from tests.data.packing_test import Letters, documents


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two files in several units, with copies, an empty text, and what is longer than a row."""
    folder = tmp_path_factory.mktemp('provenance')
    texts = documents(120)
    texts[7], texts[20], texts[95] = '', 'x' * 200, texts[3]
    texts += [texts[3], texts[50]]
    for number in range(2):
        lines = [json.dumps({'text': text}) for text in texts[number::2]]
        (folder / f'{number}.jsonl').write_text('\n'.join(lines))
    sources = (TextSource('documents', (f'{folder}/*.jsonl',)),)
    prepare(Preparation(str(folder / 'data'), sources, 32, unit_bytes=500), Letters())
    return folder / 'data'


@pytest.mark.parametrize('seq_len', [32, 8])
def test_a_row_is_what_its_passages_say(folder, seq_len):
    rows, num_tokens = PreparedRows(folder, seq_len), 0
    for number, row in enumerate(rows):
        found = passages_of(rows, number)
        assert found[0].begin == 0 and found[-1].end == np.sum(row['segment_ids'] > 0)
        for place, passage in enumerate(found):
            ids = Letters().encode(read_text(passage.file, reading_of(rows), passage.record), True, True)
            behind = passage.first_token + passage.end - passage.begin
            np.testing.assert_array_equal(
                row['tokens'][passage.begin : passage.end], ids[passage.first_token : behind]
            )
            assert passage.is_whole == (behind == len(ids))
            assert set(row['segment_ids'][passage.begin : passage.end]) == {place + 1}
            num_tokens += passage.end - passage.begin - 1
    assert num_tokens == rows.num_tokens - rows.num_documents  # every token but BOS is a target once


def test_documents_and_their_copies_are_counted(folder):
    rows = PreparedRows(folder)
    lengths = document_lengths(rows)
    assert len(lengths) == rows.num_documents and lengths.sum() == rows.num_tokens and lengths.max() == 202
    shards = range(len(rows.manifest['shards']))
    assert sum(len(read_stream(rows, shard)) for shard in shards) == rows.num_tokens and len(shards) > 3
    looked_at, copies = find_copies(rows, 10**6)
    assert looked_at == rows.num_documents
    largest = copies[0]
    assert len(largest.places) == 3 and len(copies) >= 2  # very short texts may be equal too
    assert len({read_text(file, reading_of(rows), record) for file, record in largest.places}) == 1
    assert find_copies(rows, 1)[0] < looked_at / 2


def test_what_cannot_be_told_is_said(folder, tmp_path):
    write_prepared(documents(), Letters(), 32, tmp_path / 'texts')
    with pytest.raises(
        InputError, match='does not tell which files its documents are from; prepare it again'
    ):
        passages_of(PreparedRows(tmp_path / 'texts'), 0)
    file = passages_of(PreparedRows(folder), 0)[0].file
    with pytest.raises(InputError, match='has no record 999 any more'):
        read_text(file, reading_of(PreparedRows(folder)), 999)


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('files', 5), ('files', ['a.txt']), ('files', [{'name': None}]), ('source', None), ('source', {}),
        ('source', {'reading': 'text'}), ('source', {'reading': {'text_key': 'text', 'separator': 1}}),
        ('source', {'reading': {'text_key': 'text', 'separator': '', 'a': 1}}), ('filters', []),
        ('filters', {'bad': 1, 'empty': '2', 'held_out': 3}), ('bad_first', 5), ('empty_first', None),
    ],
)  # fmt: skip
def test_a_manifest_that_tells_nonsense_of_where_documents_are_from_is_refused(folder, tmp_path, key, value):
    manifest = json.loads((folder / 'manifest.json').read_text())
    (tmp_path / 'manifest.json').write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(InputError, match=rf'manifest.json lacks or spoils {key}; copy or prepare it again'):
        PreparedRows(tmp_path)


def test_verification_covers_the_tables_of_documents(folder):
    rows = PreparedRows(folder)
    rows.verify()
    table = folder / 'documents-00001.npy.zst'
    content = table.read_bytes()
    try:
        table.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match='documents-00001.npy.zst differs from what was written'):
            rows.verify()
        table.unlink()
        with pytest.raises(InputError, match='documents-00001.npy.zst is missing'):
            rows.verify()
    finally:
        table.write_bytes(content)
