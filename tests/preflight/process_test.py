"""Preflight in a process of its own; here, what is kept of it (`tests/face_test.py` refuses)."""

import json

import pytest

from llama_jax.errors import InputError
from llama_jax.preflight import process
from llama_jax.preflight.process import Report, run


@pytest.fixture
def asked(monkeypatch):
    """What the command was asked; it answers the number of the question."""
    found = []

    def answer(given):
        found.append(dict(given))
        values = {
            'model': 'tiny',
            'topology': given['topology'],
            'chips': len(found),
            'devices': 1,
            'chip': {},
        }
        return Report(**values, mesh={}, settings={}, versions={}, process_memory=0.5, text='as printed')

    monkeypatch.setattr(process, '_compiled', answer)
    return found


def test_a_report_that_is_kept_is_read_again(tmp_path, asked):
    keep = tmp_path / 'runs' / 'report.json'
    first = run('c.py:tiny', 'v5e:1x1', {'train.batch_size': 4}, keep=keep)
    assert run('c.py:tiny', 'v5e:1x1', {'train.batch_size': 4}, keep=keep) == first
    assert len(asked) == 1 and asked[0]['config.train.batch_size'] == 4
    # Another question, and another version, are asked anew.
    assert run('c.py:tiny', 'v5e:1x1', {'train.batch_size': 8}, keep=keep).chips == 2
    kept = json.loads(keep.read_text())
    keep.write_text(json.dumps(kept | {'asked': kept['asked'] | {'jax': '0.1'}}))
    assert run('c.py:tiny', 'v5e:1x1', {'train.batch_size': 8}, keep=keep).chips == 3
    keep.write_text(json.dumps(json.loads(keep.read_text()) | {'report': {'model': 'tiny'}}))
    assert run('c.py:tiny', 'v5e:1x1', {'train.batch_size': 8}, keep=keep).chips == 4
    keep.write_text('')
    assert run('c.py:tiny', 'v5e:1x1', {'train.batch_size': 8}, keep=keep).chips == 5
    assert run('c.py:tiny', 'v5e:1x1').chips == 6 and run('c.py:tiny', 'v5e:1x1').chips == 7


@pytest.mark.parametrize('content', ['notes of mine', '[1]', '{"report": 1}', '{"asked": ', ' '])
def test_a_file_that_is_no_kept_report_stays(tmp_path, asked, content):
    keep = tmp_path / 'notes.txt'
    keep.write_text(content)
    with pytest.raises(InputError, match='notes.txt is there and is no report of this kind; remove it'):
        run('c.py:tiny', 'v5e:1x1', keep=keep)
    with pytest.raises(InputError, match='is a folder; name a file'):
        run('c.py:tiny', 'v5e:1x1', keep=tmp_path)
    assert keep.read_text() == content and not asked
