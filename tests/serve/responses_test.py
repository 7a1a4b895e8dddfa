"""The newer API by the official client: texts, calls of functions, streams, and that nothing is kept."""

import inspect
import json

import openai
import pytest
from openai.resources.responses import Responses
from openai.types.responses import Response

from llama_jax.serve.parameters import HARMLESS, REFUSED
from llama_jax.serve.responses import ResponseBody
from tests.serve.serving import Script, make_tokenizer, scripted, serving

CALL = '{"name": "weather", "parameters": {"town": "Ulm"}}'
WEATHER = {'type': 'function', 'name': 'weather', 'parameters': {'type': 'object'}, 'strict': False}


@pytest.fixture(scope='module')
def script():
    return Script('Hello, wörld!')


@pytest.fixture(scope='module')
def client(script):
    with serving(lambda: scripted(script)) as (client, _):
        yield client


def official(client):
    return openai.OpenAI(api_key='any', base_url='http://testserver/v1', http_client=client, max_retries=0)


def test_texts_whole_and_streamed(client, script):
    create = official(client).responses.create
    whole = create(model='toy', input='Hi', instructions='Be brief.')
    assert whole.output_text == 'Hello, wörld!' and whole.status == 'completed'
    assert whole.usage.output_tokens == 14 and not whole.store
    heard = make_tokenizer().decode(script.asked[-1].tokens)
    assert heard.index('Be brief.') < heard.index('Hi')
    events = list(create(model='toy', input=[{'role': 'user', 'content': 'Hi'}], stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == 'response.created' and kinds[-1] == 'response.completed'
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == 'response.output_text.delta']
    assert ''.join(deltas) == 'Hello, wörld!' == events[-1].response.output_text and len(deltas) > 2
    cut = create(model='toy', input='Hi', max_output_tokens=5)
    assert cut.status == 'incomplete' and cut.incomplete_details.reason == 'max_output_tokens'
    assert cut.output_text == 'Hello'


def test_an_answer_of_no_text_is_told_as_one():
    """What is in the response at its end was announced before, piece by piece."""
    with serving(lambda: scripted(Script(''))) as (client, _):
        events = list(official(client).responses.create(model='toy', input='Hi', stream=True))
    kinds = [event.type.removeprefix('response.') for event in events]
    told = [
        'output_item.added',
        'content_part.added',
        'output_text.done',
        'content_part.done',
        'output_item.done',
    ]
    assert kinds == ['created', 'in_progress', *told, 'completed']
    (item,) = events[-1].response.output
    assert item.id == events[2].item.id and item.content[0].text == ''


def test_a_call_and_its_answer_go_round():
    script = Script(CALL, CALL, 'Sunny.')
    with serving(lambda: scripted(script)) as (client, _):
        create = official(client).responses.create
        (call,) = create(model='toy', input='Hi', tools=[WEATHER]).output
        assert call.type == 'function_call' and json.loads(call.arguments) == {'town': 'Ulm'}
        events = list(create(model='toy', input='Hi', tools=[WEATHER], stream=True))
        joined = ''.join(e.delta for e in events if e.type == 'response.function_call_arguments.delta')
        assert json.loads(joined) == {'town': 'Ulm'} and events[-1].response.output[0].arguments == joined
        given = [
            {'role': 'user', 'content': [{'type': 'input_text', 'text': 'Hi'}]}, call.to_dict(),
            {'type': 'function_call_output', 'call_id': call.call_id, 'output': 'sun'},
        ]  # fmt: skip
        answer = create(model='toy', input=given, tools=[WEATHER])
        assert answer.output_text == 'Sunny.'
        assert 'ipython' in make_tokenizer().decode(script.asked[-1].tokens)


@pytest.mark.parametrize(
    ('change', 'param'),
    [
        ({'previous_response_id': 'x'}, 'previous_response_id'),
        ({'background': True}, 'background'),
        ({'tools': [{'type': 'web_search'}]}, 'tools[0].type'),
        ({'input': []}, 'input'),
        ({'input': [{'role': 'user'}]}, 'input[0].content'),
        ({'input': 'x' * 1000}, 'input'),
        ({'max_output_tokens': 0}, 'max_output_tokens'),
        ({'temperature': 3}, 'temperature'),
        ({'text': {'format': {'type': 'json_schema', 'name': 'x'}}}, 'text.format.schema'),
        ({'text': {'format': {'type': 'json_object'}}}, 'text.format'),
        ({'reasoning': {'effort': 'high'}}, 'reasoning'),
    ],
)
def test_what_is_wrong_is_named_as_it_was_given(client, change, param):
    response = client.post('/v1/responses', json={'model': 'toy', 'input': 'Hi'} | change)
    assert response.status_code == 400 and response.json()['error']['param'] == param, response.text


def test_every_parameter_is_honoured_or_told_of(client):
    names = set(inspect.signature(Responses.create).parameters)
    names -= {'self', 'extra_headers', 'extra_query', 'extra_body', 'timeout'}
    assert not names - ResponseBody.model_fields.keys() - HARMLESS - REFUSED - {'prompt'}
    answer = client.post('/v1/responses', json={'model': 'toy', 'input': 'Hi', 'store': True, 'user': 'x'})
    assert Response.model_validate(answer.json()).output_text == 'Hello, wörld!'
    asked = {'model': 'toy', 'input': 'Hi', 'prompt': {'id': 'x'}}
    assert client.post('/v1/responses', json=asked).json()['error']['param'] == 'prompt'
