"""Ratings from a file and from a command."""

import json
import sys

import pytest

from llama_jax.eval.text_rating import CommandRating, file_rating
from llama_jax.types import InputError


def test_file(tmp_path):
    path = tmp_path / 'scores.jsonl'
    path.write_text(
        '\n'.join(json.dumps({'text': text, 'score': score}) for text, score in (('a\nb', 0.25), ('c', 1)))
    )
    rate = file_rating(str(path))
    assert rate('a\nb') == 0.25 and rate('c') == 1.0
    with pytest.raises(InputError, match="has no score for 'd'"):
        rate('d')
    path.write_text('{"text": "a"}')
    with pytest.raises(InputError, match="scores.jsonl:1: item without 'score'"):
        file_rating(str(path))


def test_command_is_started_once(tmp_path):
    script = tmp_path / 'rate.py'
    script.write_text(
        'import json, sys\n'
        'for i, line in enumerate(sys.stdin):\n'
        '    print(len(json.loads(line)) + 100 * i, flush=True)\n'
    )
    with CommandRating(f'{sys.executable} {script}') as rate:
        assert [rate('abc'), rate('a\nb c'), rate('')] == [3.0, 105.0, 200.0]


@pytest.mark.parametrize('code', ['print("toxic", flush=True)', 'pass'])
def test_command_that_gives_no_number(tmp_path, code):
    script = tmp_path / 'rate.py'
    script.write_text(f'import sys\nsys.stdin.readline()\n{code}\n')
    with (
        CommandRating(f'{sys.executable} {script}') as rate,
        pytest.raises(InputError, match='with a number'),
    ):
        rate('abc')


@pytest.mark.parametrize(('command', 'reason'), [(' ', 'is empty'), ("rate 'it", 'No closing quotation')])
def test_command_that_is_none(command, reason):
    with pytest.raises(InputError, match=reason):
        CommandRating(command)


def test_command_that_is_not_there():
    with CommandRating('/no/such/classifier') as rate, pytest.raises(InputError, match='/no/such/classifier'):
        rate('abc')
