"""Reading publishers' files: each kind, and each way of being malformed."""

import csv
import gzip
import json

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.documents import DocumentSource
from llama_jax.eval.tasks import TASKS

ROWS = [{'q': 'a\u2028b, "c"', 'n': '1'}, {'q': 'd', 'n': '2'}]
SOURCE = DocumentSource(
    'toy', ('items.jsonl', 'items.json', 'items.csv'), {'q': str, 'n': str}, check=lambda d: int(d['n'])
)


def _write(tmp_path, name, data):
    folder = tmp_path / 'toy'
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return str(tmp_path)


def _jsonl(rows):
    return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode()


def test_kinds_of_files(tmp_path):
    gz = DocumentSource('toy', ('items.jsonl.gz',), {'q': str})
    assert gz(_write(tmp_path, 'items.jsonl.gz', gzip.compress(_jsonl(ROWS)))) == ROWS
    with (tmp_path / 'toy' / 'items.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, ['q', 'n'])
        writer.writeheader()
        writer.writerows(ROWS)
    assert SOURCE(str(tmp_path)) == ROWS
    assert SOURCE(_write(tmp_path, 'items.json', json.dumps(ROWS).encode())) == ROWS
    assert SOURCE(_write(tmp_path, 'items.jsonl', _jsonl(ROWS))) == ROWS
    assert SOURCE(_write(tmp_path, 'items.jsonl', b'\xef\xbb\xbf' + _jsonl(ROWS) + b'\n')) == ROWS


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (_jsonl(ROWS) + b'{"q": ', r'items.jsonl:3 is not JSON'),
        (_jsonl([*ROWS, {'q': 'x'}]), r"items.jsonl:3: item without 'n'; it needs q, n"),
        (_jsonl([{'q': 5, 'n': '1'}]), r"items.jsonl:1: q is '5'; it must be str"),
        (_jsonl([{'q': 'x', 'n': 'one'}]), r'items.jsonl:1: malformed item: .*one'),
        (b'[1, 2]\n', r'items.jsonl:1: an item is a JSON object, got list'),
        (b'\xff\xfe', r'items.jsonl:1 is not JSON: .*utf-8'),
        (b'[' * 100_000, r'items.jsonl:1 is not JSON'),
        (b'', r'no items of toy in .*; expected toy/items.jsonl'),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, data, message):
    with pytest.raises(InputError, match=message) as error:
        SOURCE(_write(tmp_path, 'items.jsonl', data))
    assert len(str(error.value).splitlines()) == 1


def test_truncated_gzip(tmp_path):
    source = DocumentSource('toy', ('items.jsonl.gz',), {})
    with pytest.raises(InputError, match='cannot be read'):
        source(_write(tmp_path, 'items.jsonl.gz', gzip.compress(_jsonl(ROWS))[:-9]))


@pytest.mark.parametrize(
    ('name', 'row'),
    [
        ('piqa', {'goal': 'g', 'sol1': 'a', 'sol2': 'b', 'label': 2}),
        ('hellaswag', {'ctx': 'c', 'endings': ['a', 'b', 'c', 'd'], 'label': -1}),
        ('arc_easy', {'question': 'q', 'choices': {'text': ['a'], 'label': ['A']}, 'answerKey': 'E'}),
        (
            'siqa',
            {'context': 'c', 'question': 'q', 'answerA': 'a', 'answerB': 'b', 'answerC': 'c', 'label': '4'},
        ),
        ('winogrande', {'sentence': 'no blank', 'option1': 'a', 'option2': 'b', 'answer': '1'}),
        ('nq_open', {'question': 'q', 'answer': []}),
        ('gsm8k', {'question': 'q', 'answer': 'no number'}),
        ('math', {'problem': 'p', 'solution': 'no box'}),
    ],
)
def test_items_that_make_no_sense(tmp_path, name, row):
    source = TASKS[name].load
    (tmp_path / name).mkdir()
    (tmp_path / name / source.files[-1]).write_bytes(_jsonl([row]))
    with pytest.raises(InputError, match=r':1: malformed item'):
        TASKS[name].documents(str(tmp_path))


def test_hub_needs_its_library_or_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
    with pytest.raises(InputError, match='hf:// needs the datasets library'):
        TASKS['piqa'].documents('hf://')
    with pytest.raises(InputError, match='siqa is not read from tfds://'):
        TASKS['siqa'].documents('tfds://')
