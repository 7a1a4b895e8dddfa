"""What bad input gets of the command, row by row; every parameter of the official client is honoured or told of."""

import inspect
import json
import pathlib
import re

import httpx2
import pytest
from openai.resources.chat.completions import Completions as Chats
from openai.resources.completions import Completions

from llama_jax.serve.access import read_keys
from llama_jax.serve.bodies import ChatBody, CompletionBody
from llama_jax.serve.parameters import HARMLESS, REFUSED
from llama_jax.serve.responses import ResponseBody
from tests.serve.serving import Script, save_toy, scripted, serving
from tests.serve.started import started

USER = [{'role': 'user', 'content': 'Hi'}]
TOOL = {'type': 'function', 'function': {'name': 'weather'}}


KEYS = 'sesame-1234', 'other-12345'
# Instead of the model that is loaded.
HOOK = """
from llama_jax.serve.served import Served
from tests.serve.serving import Script, scripted
Served.create = lambda *args, **options: scripted(Script('Hello'))
"""


@pytest.fixture(scope='module')
def server(commands, folder):
    """The command, with keys."""
    save_toy(folder / 'toy')
    (folder / 'keys').write_text('\n'.join(KEYS))
    flags = '--max_body=5000', f'--api_keys={folder}/keys', '--cors_origins=https://a.org'
    with started(commands, folder / 'toy', *flags, before=HOOK) as server:
        yield server


@pytest.fixture(scope='module')
def client(server):
    headers = {'authorization': f'Bearer {KEYS[0]}'}
    with httpx2.Client(base_url=server.address, headers=headers, timeout=60) as client:
        yield client


def refusal(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()['error']
    assert error.keys() == {'message', 'type', 'param', 'code'} and '\n' not in error['message']
    return error


@pytest.mark.parametrize(
    ('change', 'param', 'words'),
    [
        ({'n': 0}, 'n', 'greater than or equal to 1'),
        ({'n': 5}, 'n', 'at most 4, the slots'),
        ({'n': True}, 'n', 'valid integer'),
        ({'n': 1.5}, 'n', 'valid integer'),
        ({'top_p': -1}, 'top_p', 'greater than 0'),
        ({'temperature': 1e9}, 'temperature', 'less than or equal to 2'),
        ({'temperature': '1'}, 'temperature', 'valid number, not "1"'),
        ({'model': None}, 'model', 'valid string, not null'),
        ({'stop': ['a', 'b', 'c', 'd', 'e']}, 'stop', 'at most 4'),
        ({'stop': ''}, 'stop', 'at least one character'),
        ({'max_tokens': 0}, 'max_tokens', 'greater than or equal to 1'),
        ({'min_tokens': 9, 'max_tokens': 3}, 'min_tokens', 'at most 3'),
        ({'messages': []}, 'messages', 'at least 1 item'),
        ({'messages': 'Hi'}, 'messages', 'valid array'),
        ({'messages': [{'role': 'robot', 'content': 'x'}]}, 'messages[0].role', "'user'"),
        ({'messages': [{'role': 'user'}]}, 'messages[0].content', 'no content'),
        ({'messages': [{'role': 'assistant', 'content': 'x'}]}, 'messages', 'must be by user'),
        (
            {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'x'}}]}]},
            'messages[0].content[0].type', "should be 'text'",
        ),
        ({'tools': [{'type': 'function', 'function': {}}]}, 'tools[0].function.name', 'required'),
        ({'tools': [TOOL, TOOL]}, 'tools', 'once'),
        ({'tool_choice': 'required'}, 'tool_choice', 'no tools'),
        ({'logprobs': True, 'top_logprobs': 1000}, 'top_logprobs', 'equal to 20'),
        ({'top_logprobs': 2}, 'top_logprobs', 'without logprobs'),
        ({'logit_bias': {'600': 1}}, None, None),
        ({'logit_bias': {'a': 1}}, 'logit_bias', 'whole number'),
        ({'logit_bias': {'9' * 4400: 1}}, 'logit_bias', 'whole number'),
        ({'logit_bias': {'6': 101}}, 'logit_bias', '-100 to 100'),
        ({'stream_options': {}}, 'stream_options', 'of a stream'),
        ({'regex': 'a', 'grammar': 'b'}, 'grammar', 'keeps to one'),
        ({'regex': 'a'}, 'regex', 'not offered here: a script'),
        ({'tools': [TOOL], 'tool_choice': 'required'}, 'tool_choice', 'not offered here'),
        ({'response_format': {'type': 'json_schema'}}, 'response_format.json_schema', 'without one'),
        ({'audio': {'voice': 'x'}}, 'audio', 'only text'),
        ({'previous_response_id': 'x'}, 'previous_response_id', 'no answers are kept'),
        ({'temprature': 1}, 'temprature', 'did you mean temperature'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(client, change, param, words):
    response = client.post('/v1/chat/completions', json={'model': 'toy', 'messages': USER} | change)
    if words is None:
        return
    error = refusal(response)
    assert error['param'] == param and words in error['message'], error


def test_what_is_no_request_at_all_is_refused(client):
    def post(content, kind='application/json', path='/v1/completions'):
        return client.post(path, content=content, headers={'content-type': kind})

    assert 'no JSON' in refusal(post('{"model"'))['message']
    assert 'no JSON' in refusal(post('[' * 2000))['message']
    assert 'empty' in refusal(post(''))['message']
    assert refusal(post('{"model": "toy", "prompt": "a", "temperature": NaN}'))['param'] == 'temperature'
    endless = '{"model": "toy", "input": "a", "tools": [{"type": "function", "name": "b", "parameters": {"c": 1e999}}]}'
    assert refusal(post(endless, path='/v1/responses'))['param'] == 'tools[0].parameters'
    refusal(post('{"model": "toy", "prompt": "\\ud800"}'))
    refusal(post('{}', kind='text/plain'), 415)
    refusal(post('x' * 5001), 413)
    refusal(client.post('/v1/completions', content=iter([b'x' * 3000] * 2), headers={'content-type': 'application/json'}), 413)  # fmt: skip  # noqa: E501
    refusal(client.get('/v1/nothing'), 404)
    refusal(client.get('/v1/completions'), 405)
    refusal(client.delete('/v1/models'), 405)


@pytest.mark.parametrize(
    ('body', 'param'),
    [
        ({'prompt': []}, 'prompt'),
        ({'prompt': [[]]}, 'prompt'),
        ({'prompt': [[600]]}, 'prompt'),
        ({'prompt': [-1]}, 'prompt[0]'),
        ({'prompt': [1, 2.5]}, 'prompt[1]'),
        ({'prompt': ['a', [1]]}, 'prompt[1]'),
        ({'prompt': {'a': 1}}, 'prompt'),
        ({'prompt': 'a', 'max_tokens': 0}, 'max_tokens'),
        ({'prompt': 'a', 'logprobs': 21}, 'logprobs'),
        ({'prompt': 'a', 'best_of': 2}, 'best_of'),
        ({'prompt': 'a', 'suffix': 'b'}, 'suffix'),
        ({'prompt': [1], 'suffix': 'b'}, 'suffix'),
    ],
)
def test_what_is_no_prompt_is_named(client, body, param):
    assert refusal(client.post('/v1/completions', json={'model': 'toy'} | body))['param'] == param


def test_nothing_is_cut_to_fit_the_context(client):
    long = 'x' * 990
    for body in ({'max_tokens': 20}, {'max_tokens': 10}, {}):
        response = client.post('/v1/completions', json={'model': 'toy', 'prompt': long} | body)
        if body == {'max_tokens': 20}:
            error = refusal(response)
            assert error['code'] == 'context_length_exceeded' and error['param'] == 'prompt'
            assert '1000' in error['message'] and '991' in error['message']
        elif not body:
            assert response.status_code == 200
    longer = [{'role': 'user', 'content': 'x' * 1000}]
    error = refusal(client.post('/v1/chat/completions', json={'model': 'toy', 'messages': longer}))
    assert error['code'] == 'context_length_exceeded' and error['param'] == 'messages'


@pytest.mark.parametrize(('body', 'method'), [(ChatBody, Chats.create), (CompletionBody, Completions.create)])
def test_every_parameter_of_the_official_client_is_honoured_or_told_of(client, body, method):
    of_transport = {'self', 'extra_headers', 'extra_query', 'extra_body', 'timeout'}
    names = set(inspect.signature(method).parameters) - of_transport
    unknown = names - body.model_fields.keys() - HARMLESS - REFUSED
    assert not unknown
    assert not HARMLESS & REFUSED and not (HARMLESS | REFUSED) & body.model_fields.keys()
    page = pathlib.Path('docs/serving.md').read_text()
    assert all(f'`{name}`' in page for name in HARMLESS)


@pytest.mark.parametrize('path', ['completions', 'chat/completions', 'responses'])
def test_a_field_of_a_wrong_kind_is_named_whatever_its_name(client, path):
    body = {'completions': CompletionBody, 'chat/completions': ChatBody, 'responses': ResponseBody}[path]
    right = {'model': 'toy', 'messages': USER, 'prompt': 'a', 'input': 'a'}
    right = {name: value for name, value in right.items() if name in body.model_fields}
    for name in body.model_fields:
        error = refusal(client.post(f'/v1/{path}', json=right | {name: [[{}], {}]}))
        assert re.match(rf'{name}\b', error['param'] or ''), (name, error)
        assert error['message'].startswith(error['param'])


def test_keys_open_and_nothing_else_does(server):
    body = {'model': 'toy', 'messages': USER}
    with httpx2.Client(base_url=server.address) as client:
        for headers in ({}, {'authorization': 'Bearer wrong-12345'}, {'authorization': 'Basic sesame-1234'}):
            for response in (
                client.post('/v1/chat/completions', json=body, headers=headers),
                client.get('/v1/models', headers=headers),
            ):
                assert 'sesame' not in response.text
                refusal(response, 401)
        for key in KEYS:
            right = {'authorization': f'Bearer {key}'}
            assert client.post('/v1/chat/completions', json=body, headers=right).status_code == 200
        assert client.options('/v1/models').status_code == 405  # no key is asked for
        assert [client.get(path).status_code for path in ('/health', '/ready', '/metrics')] == [200] * 3


def test_keys_are_read_from_a_file_of_any_editor(tmp_path):
    file = tmp_path / 'keys'
    file.write_bytes(b'\xef\xbb\xbfsesame-1234\r\n\r\n# of a friend\r\nother-12345\r\n')
    assert read_keys(str(file)) == ('sesame-1234', 'other-12345')


def test_pages_elsewhere_may_not_ask_unless_they_are_named(client):
    origin = {'origin': 'https://a.org', 'access-control-request-method': 'POST'}
    with serving(lambda: scripted(Script('Hello')), hosts=('localhost', '127.0.0.1')) as (without, _):
        assert refusal(without.get('/v1/models', headers={'host': 'evil.org'}), 403)
        assert without.get('/v1/models', headers={'host': 'LocalHost:8000'}).status_code == 200
        answer = without.options('/v1/chat/completions', headers=origin | {'host': 'localhost:8000'})
        assert 'access-control-allow-origin' not in answer.headers
    answer = client.options('/v1/chat/completions', headers=origin)
    assert answer.status_code == 200 and answer.headers['access-control-allow-origin'] == 'https://a.org'
    other = client.options('/v1/chat/completions', headers=origin | {'origin': 'https://b.org'})
    assert 'access-control-allow-origin' not in other.headers


def test_tokens_as_remote_tokenizers_ask_for_them(client):
    info = client.get('/tokenizer_info').json()
    assert info['bos_token'] == '<|begin_of_text|>' and info['eos_token'] == '<|end_of_text|>'

    def tokenize(text, **more):
        return client.post('/tokenize', json={'prompt': text} | more).json()['tokens']

    assert tokenize('<|begin_of_text|>', add_special_tokens=False) == [256]
    assert tokenize('ab') == [256, 97, 98] == tokenize('<|begin_of_text|>ab')
    assert client.post('/detokenize', json={'tokens': [97, 98]}).json() == {'prompt': 'ab'}
    assert refusal(client.post('/detokenize', json={'tokens': [512]}))['param'] == 'tokens'
    assert (
        json.loads(client.post('/tokenize', json={'prompt': 'é', 'add_special_tokens': False}).text)['count']
        == 2
    )
