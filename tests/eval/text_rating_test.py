"""Ratings from a file and from a command."""

import json
import sys
import time

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.text_rating import CommandRating, file_rating


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


def test_command_that_does_not_answer_is_said_and_given_up(tmp_path, caplog, monkeypatch):
    script = tmp_path / 'rate.py'
    script.write_text('import time\nprint(open("/dev/stdin").readline() and 1, flush=True)\ntime.sleep(60)\n')
    start = time.monotonic()
    with CommandRating(f'{sys.executable} {script}', patience=0.1) as rate:
        rate('a')  # Python may take its time to start
        monkeypatch.setattr(rate, '_timeout', 1.0)
        long = 'b' * 1_000_000  # more than a pipe takes
        with pytest.raises(InputError, match="did not answer 'b{40}' within 1 s"):
            rate(long)
    assert 'has not answered for 0.1 s' in caplog.text
    assert time.monotonic() - start < 40  # not the minute that it sleeps


def test_command_that_dies_says_how(tmp_path):
    script = tmp_path / 'rate.py'
    script.write_text('import sys\nsys.exit(3)\n')
    with (
        CommandRating(f'{sys.executable} {script}') as rate,
        pytest.raises(InputError, match='ended with status 3'),
    ):
        rate('abc')


@pytest.mark.parametrize(('command', 'reason'), [(' ', 'is empty'), ("rate 'it", 'No closing quotation')])
def test_command_that_is_none(command, reason):
    with pytest.raises(InputError, match=reason):
        CommandRating(command)


def test_command_that_is_not_there():
    with pytest.raises(InputError, match="no program '/no/such/classifier'"):
        CommandRating('/no/such/classifier --fast')
