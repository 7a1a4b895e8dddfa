"""Whatever JSON a file holds, it is read, or refused in one line, soon and in little memory."""

import io
import json

import pytest
from etils import epath

from llama_jax import json_file
from llama_jax.errors import InputError
from llama_jax.json_file import parse_json, parse_object, read_lines, read_object, show_json

BAD = {
    'empty': ('', 'is not JSON'),
    'cut': ('{"a": [1, 2', 'is not JSON'),
    'no utf-8': (b'{"a": "\xff"}', 'is not JSON'),
    'deep': ('[' * 200_000, 'is not JSON'),
    'deep object': ('{"a":' * 200_000, 'is not JSON'),
    'many digits': ('{"a": ' + '9' * 5001 + '}', 'is not JSON'),
    'many values': ('[' + '[],' * 4_000_001 + '[]]', 'at most'),
}
BAD_OBJECTS = {
    'list': ('[1]', 'is a JSON list'),
    'number': ('3', 'is a JSON int'),
    'twice': ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    'nan': ('{"a": NaN}', 'NaN is no number'),
    'infinite': ('{"a": -Infinity}', '-Infinity is no number'),
    'beyond floats': ('{"a": 1e400}', '1e400 is beyond'),
    'beyond floats, whole': ('{"a": 1' + '0' * 400 + '}', '401 digits'),
    'half a character': ('{"a": {"b": "x\\ud800"}}', 'holds half a character'),
    'nested': ('{"a": ' + '[' * 101 + ']' * 101 + '}', 'more than 100 deep'),
}


def refusal(read, *args):
    with pytest.raises(InputError) as caught:
        read(*args)
    message = str(caught.value)
    assert '\n' not in message and len(message) < 500 and message.startswith('FILE')
    return message


@pytest.mark.parametrize(('text', 'reason'), BAD.values(), ids=list(BAD))
def test_what_is_no_json_is_refused_in_one_line(text, reason):
    assert reason in refusal(parse_json, text, 'FILE')
    assert reason in refusal(parse_object, text, 'FILE')


@pytest.mark.parametrize(('text', 'reason'), BAD_OBJECTS.values(), ids=list(BAD_OBJECTS))
def test_an_object_is_read_strictly(text, reason):
    assert reason in refusal(parse_object, text, 'FILE')


def test_right_values_are_those_of_pythons_own_parser():
    # A tokenizer_config.json has 1000000000000000019884624838656 for "no limit".
    text = (
        '{"model_max_length": 1000000000000000019884624838656, "x": [[1.5, -2e-7], {"y": null}], "é": true}'
    )
    assert parse_object(text, '') == parse_object(('\ufeff' + text).encode(), '') == json.loads(text)
    assert str(parse_json('[NaN, {"a": 1, "a": 2}]', '')) == "[nan, {'a': 2}]"  # as data sets have it


def test_files_and_lines_have_a_limit(tmp_path, monkeypatch):
    file = epath.Path(tmp_path / 'a.json')
    assert 'cannot be read: No such file' in refusal_of(read_object, file)
    file.write_text(json.dumps({'a': 'x' * 100}))
    assert 'more than 100 bytes' in refusal_of(read_object, file, 100)
    assert read_object(file, 200) == {'a': 'x' * 100}
    lines = b'short\n\n' + b'x' * 20 + b'\nend'
    assert list(read_lines(io.BytesIO(lines), 'FILE', 21)) == lines.splitlines(keepends=True)
    assert 'FILE line 3 has more than' in refusal(lambda: list(read_lines(io.BytesIO(lines), 'FILE', 19)))
    monkeypatch.setattr(json_file, '_MAX_VALUES', 3)
    assert parse_json('[1, 2]', 'FILE') == [1, 2]
    assert 'up to 4 values; at most' in refusal(parse_json, '[1, {}, 2]', 'FILE')
    monkeypatch.setattr(json_file, 'MAX_BYTES', 10)
    assert 'at most 10' in refusal(parse_json, '"0123456789"', 'FILE')


def refusal_of(read, file, *args):
    with pytest.raises(InputError) as caught:
        read(file, *args)
    assert str(caught.value).startswith(str(file))
    return str(caught.value)


def test_what_a_message_shows_is_short():
    assert show_json('a\nb' * 100).count('\n') == 0 and len(show_json(['x'] * 1000)) < 130
    assert show_json(10**5000) == 'a huge number'
