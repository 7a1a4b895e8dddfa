"""Corpora as they are published: their files are read, and a row is told with what its documents' records say."""

import gzip
import json

import pytest
import zstandard

from experiments.preparation.inspection import describe_row
from llama_jax.data.preparation import Preparation, TextSource
from llama_jax.data.prepare import prepare
from llama_jax.data.prepared import PreparedRows
from llama_jax.data.sources import Reading, read_fields
from llama_jax.errors import InputError
from tests.data.packing_test import Letters


def write_lines(path, items):
    data = b''.join(json.dumps(item).encode() + b'\n' for item in items)
    packed = {'.gz': gzip.compress, '.zst': zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(data))


def write_table(path, items):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(items), path)


# Of each: a file and its glob, the fields of a record beside its text, by its data card.
LAYOUTS = {
    'RedPajama-1T, arXiv': (
        'arxiv/arxiv_000.jsonl', 'arxiv/*.jsonl', {'meta': {'timestamp': '2017-01-01', 'arxiv_id': '1701.1'}},
    ),
    'RedPajama-1T, Common Crawl': (
        'common_crawl/2023-06/en_head_0.json.gz.dedup.classifier.jsonl.zst', 'common_crawl/*/*.jsonl.zst',
        {'pred_label': '__label__cc', 'source': 'cc/2023-06/en_head', 'url': 'http://a.org/b'},
    ),
    'Dolma': (
        'v1_7/c4-filtered-0000.json.gz', 'v1_7/*.json.gz',
        {'id': '7a', 'source': 'c4', 'added': '2023-05-05', 'metadata': {'url': 'https://a.org', 'lang': {'en': 0.9}}},
    ),
    'C4': (
        'en/c4-train.00000-of-01024.json.gz', 'en/c4-train.*.json.gz',
        {'timestamp': '2019-04-25T12:57:54Z', 'url': 'https://a.org/c'},
    ),
    'FineWeb': (
        'data/CC-MAIN-2024-10/000_00000.parquet', 'data/*/*.parquet',
        {'id': '<urn:uuid:1>', 'dump': 'CC-MAIN-2024-10', 'url': 'https://a.org', 'token_count': 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_layout_is_read_and_its_rows_are_told_with_what_is_said_of_them(layout, tmp_path):
    name, pattern, beside = LAYOUTS[layout]
    texts = [f'document {number}' for number in range(6)]
    items = [
        {'text': text} | {key: f'{number}{value}' if key == 'url' else value for key, value in beside.items()}
        for number, text in enumerate(texts)
    ]
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    (write_table if file.suffix == '.parquet' else write_lines)(file, items)
    source = TextSource('all', (f'{tmp_path}/{pattern}',), Reading())
    prepare(Preparation(f'{tmp_path}/rows', (source,), seq_len=16), Letters())
    rows = PreparedRows(f'{tmp_path}/rows')
    assert rows.num_documents == len(texts)
    for number, item in enumerate(items):
        assert read_fields(str(file), 'text', number) == {key: item[key] for key in beside}
    shown = describe_row(rows, 0, None)
    assert f'{file} record 0' in shown
    for key, value in items[0].items():
        assert (f'{key}: {value!r}' in shown) == (key != 'text')
    file.unlink()
    assert str(file) in describe_row(rows, 0, None)  # what it is of is told without it


def test_fields_beside_a_text_within_a_field_are_kept(tmp_path):
    lines = [{'body': {'text': 'a', 'kind': 'b'}, 'id': 1}, {'body': {'text': 'c'}}]
    write_lines(tmp_path / 'a.jsonl', lines)
    assert read_fields(f'{tmp_path}/a.jsonl', 'body.text', 0) == {'body': {'kind': 'b'}, 'id': 1}
    assert read_fields(f'{tmp_path}/a.jsonl', 'body.text', 1) == {}
    with pytest.raises(InputError, match='has no record 2 any more'):
        read_fields(f'{tmp_path}/a.jsonl', 'body.text', 2)
    (tmp_path / 'a.txt').write_text('a')
    assert read_fields(f'{tmp_path}/a.txt', 'text', 0) == {}
