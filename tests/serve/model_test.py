"""A real model behind the server: what it says is what `complete` says, and nothing is compiled after it is ready."""

import dataclasses
import hashlib
import json
import re
import threading
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import openai
import pydantic
import pytest

import llama_jax
from llama_jax.inference.constraint import Rules
from llama_jax.inference.scoring import score, score_tokens
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.unstacked import unstack
from llama_jax.serve import constraints
from llama_jax.serve.served import Served, chat_of, rules_of
from tests import toy
from tests.serve.serving import events, make_tokenizer, serving

PROMPTS = ['Once', 'upon a time there', 'x', 'Zwölf Boxkämpfer jagen']
ROWS = {'num_slots': 4, 'max_steps': 4, 'log_probabilities': 5, 'prefix_bytes': (1 << 20, 0)}


@pytest.fixture(scope='module')
def loaded():
    config = dataclasses.replace(toy.CONFIG, vocab_size=512, max_seq_len=64, num_layers=2)
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    return model, unstack(toy.make_params(model), model.dtype), make_tokenizer()


@pytest.fixture(scope='module')
def wanted(loaded):
    """Before there is a server, which counts what is compiled."""
    return llama_jax.generate(*loaded, PROMPTS, max_new_tokens=20)


@pytest.fixture(scope='module')
def server(loaded, wanted):
    model, params, tokenizer = loaded
    with serving(
        lambda: Served.create(
            model, params, tokenizer, chat_of(tokenizer, ''), rules_of(tokenizer, model, False), **ROWS
        )
    ) as both:
        yield both


def complete(client, **body):
    response = client.post('/v1/completions', json={'model': 'toy', 'temperature': 0} | body)
    assert response.status_code == 200, response.text
    return response


def test_it_says_what_the_library_says_whole_streamed_and_at_a_time(wanted, server):
    client, service = server
    prompts, found = PROMPTS, {}

    def ask(prompt, streamed):
        response = complete(client, prompt=prompt, max_tokens=20, stream=streamed)
        if streamed:
            pieces = [json.loads(line)['choices'][0]['text'] for line in events(response.text)[:-1]]
            found[prompt, streamed] = ''.join(pieces)
        else:
            found[prompt, streamed] = response.json()['choices'][0]['text']

    threads = [threading.Thread(target=ask, args=(p, s)) for p in prompts for s in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt, False] for prompt in prompts] == wanted == [found[p, True] for p in prompts]
    together = complete(client, prompt=prompts, max_tokens=20, n=2).json()['choices']
    assert [choice['text'] for choice in together] == [text for text in wanted for _ in range(2)]
    assert [choice['index'] for choice in together] == list(range(8))
    drawn = {'prompt': 'Once', 'max_tokens': 20, 'temperature': 1, 'seed': 5, 'n': 3}
    first, again = (complete(client, **drawn).json()['choices'] for _ in range(2))
    assert [one['text'] for one in first] == [one['text'] for one in again]
    assert len({one['text'] for one in first}) == 3
    assert complete(client, prompt='Once', max_tokens=9, temperature=1).json()['choices'][0]['text'] != first[0]['text'][:9]  # fmt: skip  # noqa: E501
    # All that came so far, penalties, biases and scores of every width too, runs in programs that were there.
    for size in (1, 2, 7, 31, 40, 62):
        complete(client, prompt=[65] * size, max_tokens=1, echo=True, logprobs=3, presence_penalty=1.0,
                 logit_bias={'65': -5}, stop=['zz'], temperature=0.7, top_p=0.9, top_k=5, min_p=0.01)  # fmt: skip
    assert b'llama_programs_compiled_total 0.0' in service.metrics.render()


def test_echo_tells_of_each_token_of_the_prompt_and_one_more(loaded, server):
    client, _ = server
    model, params, tokenizer = loaded
    ids = [256, *b'Once upon']
    choice = complete(client, prompt=[ids], max_tokens=1, echo=True, logprobs=1).json()['choices'][0]
    told = choice['logprobs']
    assert {len(values) for values in told.values()} == {len(ids) + 1}
    assert told['token_logprobs'][0] is None and told['top_logprobs'][0] is None
    wanted = [score.log_probability for score in score_tokens(model, params, [ids])[0]][1:]
    # Rows of other widths are other sums.
    np.testing.assert_allclose(told['token_logprobs'][1:-1], wanted, atol=1e-5)
    for value, likely in zip(told['token_logprobs'][1:], told['top_logprobs'][1:], strict=True):
        assert value in likely.values() and 1 <= len(likely) <= 2
    assert choice['text'].startswith('Once upon') and told['text_offset'][:3] == [0, 0, 1]
    # The next token is one that ends the text: it is told of all the same.
    best = max(told['top_logprobs'][-1], key=told['top_logprobs'][-1].get)
    ends = complete(client, prompt=[ids], max_tokens=1, echo=True, logprobs=1, logit_bias={'257': 100}).json()
    assert len(ends['choices'][0]['logprobs']['tokens']) == len(ids) + 1
    assert ends['choices'][0]['finish_reason'] == 'stop' and ends['choices'][0]['text'] == 'Once upon'
    assert best != '<|end_of_text|>'
    alone = complete(client, prompt=[ids], max_tokens=0, echo=True, logprobs=1).json()['choices'][0]
    np.testing.assert_array_equal(alone['logprobs']['token_logprobs'][1:], told['token_logprobs'][1:-1])
    streamed = events(complete(client, prompt=[ids], max_tokens=1, echo=True, logprobs=1, stream=True).text)
    pieces = [json.loads(line)['choices'][0]['logprobs'] for line in streamed[:-1]]
    assert sum((piece['token_logprobs'] for piece in pieces if piece), []) == told['token_logprobs']


def test_beginnings_of_prompts_are_read_once(loaded, server):
    client, service = server
    prompt = list(range(64, 127))[:60]
    first = complete(client, prompt=prompt, max_tokens=3).json()
    again = complete(client, prompt=prompt, max_tokens=3).json()
    assert first['choices'] == again['choices']
    assert again['usage']['prompt_tokens_details']['cached_tokens'] in (0, 32, 48)
    assert b'llama_first_token_seconds_count' in service.metrics.render()


class Step(pydantic.BaseModel):
    kind: Literal['add', 'take']
    number: Annotated[int, pydantic.Field(ge=0, le=99)]


SIZE = {'enum': ['S', 'M', 'L']}
SCHEMAS = [
    {'const': 'yes'},
    {'type': 'boolean'},
    {'type': 'integer', 'minimum': -5, 'maximum': 5},
    SIZE,
    {'type': 'string', 'maxLength': 4},
    {'type': 'string', 'pattern': '^[a-f]{2}[0-9]$'},
    {'type': 'array', 'items': {'type': 'boolean'}, 'minItems': 1, 'maxItems': 2},
    {'anyOf': [{'type': 'null'}, {'type': 'integer', 'minimum': 0, 'maximum': 9}]},
    {'type': 'object', 'properties': {'a': SIZE}, 'required': ['a'], 'additionalProperties': False},
    {'$ref': '#/$defs/size', '$defs': {'size': SIZE}},
]
SELL = {
    'type': 'function',
    'function': {
        'name': 'sell',
        'parameters': {
            'type': 'object', 'properties': {'size': SIZE}, 'required': ['size'], 'additionalProperties': False,
        },
    },
}  # fmt: skip


def fits(value, schema):
    """Of what the schemas above have."""
    schema = schema.get('$defs', {}).get('size', schema)
    of_type = {
        'boolean': bool, 'integer': int, 'string': str, 'array': list, 'object': dict, 'null': type(None)
    }  # fmt: skip
    if 'anyOf' in schema:
        return any(fits(value, one) for one in schema['anyOf'])
    if 'enum' in schema or 'const' in schema:
        return value in schema.get('enum', [schema.get('const')])
    if (
        not isinstance(value, of_type[schema['type']])
        or schema['type'] == 'integer'
        and isinstance(value, bool)
    ):
        return False
    size = len(value) if isinstance(value, str | list) else 0
    inside = (
        schema.get('minimum', 0) <= value <= schema.get('maximum', 0) if schema['type'] == 'integer' else True
    )
    return (
        inside
        and schema.get('minItems', 0) <= size <= schema.get('maxLength', schema.get('maxItems', 99))
        and re.search(schema.get('pattern', ''), value if isinstance(value, str) else '') is not None
        and (not isinstance(value, dict) or value.keys() == {'a'} and value['a'] in SIZE['enum'])
    )


def programs(service):
    return re.search(rb'llama_programs_compiled_total (\S+)', service.metrics.render())[1]


HI = {'model': 'toy', 'messages': [{'role': 'user', 'content': 'Hi'}], 'temperature': 2}


def official_client(client):
    return openai.OpenAI(api_key='any', base_url='http://testserver/v1', http_client=client, max_retries=0)


def check_schemas(create, rounds):
    """Four answers to each of ten schemas a round: all end, and all are valid."""
    for number, schema in enumerate(SCHEMAS * rounds):
        kind = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema}}
        answer = create(**HI, response_format=kind, n=4, seed=number)
        assert {choice.finish_reason for choice in answer.choices} == {'stop'}
        for choice in answer.choices:
            assert fits(json.loads(choice.message.content), schema), (schema, choice.message.content)


@pytest.mark.slow
def test_all_of_two_hundred_answers_keep_to_schemas(server):
    check_schemas(official_client(server[0]).chat.completions.create, rounds=5)


def test_answers_keep_to_schemas_and_calls_to_their_functions(server):
    client, service = server
    before = programs(service)
    official = official_client(client)
    create = official.chat.completions.create
    check_schemas(create, rounds=1)
    parsed = official.chat.completions.parse(**HI, response_format=Step, seed=1)
    assert parsed.choices[0].message.parsed.number < 100
    # Described as Llama 3.1 heard of them, functions take more room than this model has.
    brief = chat_of(make_tokenizer(), "{{ bos_token + messages[-1]['content'] }}")
    served = service.worker.served
    service.worker.served = dataclasses.replace(served, chat=brief)
    try:
        for choice in ('required', {'type': 'function', 'function': {'name': 'sell'}}):
            (answer,) = create(**HI, tools=[SELL], tool_choice=choice).choices
            assert answer.finish_reason == 'tool_calls'
            call = answer.message.tool_calls[0].function
            assert call.name == 'sell' and json.loads(call.arguments)['size'] in SIZE['enum']
        chunks = create(**HI, tools=[SELL], tool_choice='required', stream=True)
        deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert json.loads(''.join(delta.function.arguments for delta in deltas)).keys() == {'size'}
    finally:
        service.worker.served = served
    answer = complete(client, prompt='x', temperature=2, regex='[ab]{2,4}', n=4, max_tokens=9).json()
    assert all(re.fullmatch('[ab]{2,4}', choice['text']) for choice in answer['choices'])
    streamed = complete(client, prompt='x', temperature=2, grammar='start: "on" | "off"', stream=True).text
    text = ''.join(json.loads(line)['choices'][0]['text'] for line in events(streamed)[:-1])
    assert text in ('on', 'off')
    assert programs(service) == before


def test_a_rule_that_is_wrong_or_slow_is_refused_while_others_are_answered(server, monkeypatch):
    client, service = server
    rules = Rules(make_tokenizer(), 512)

    def refused(**body):
        response = client.post(
            '/v1/completions', json={'model': 'toy', 'prompt': 'x', 'max_tokens': 4} | body
        )
        assert response.status_code == 400
        return response.json()['error']

    assert refused(regex='(a')['param'] == 'regex'
    assert refused(grammar='start: x')['param'] == 'grammar'
    assert refused(regex='a', min_tokens=2)['param'] == 'min_tokens'
    assert refused(regex='a' * 70_000)['param'] == 'regex'
    is_over, found = threading.Event(), []

    def takes_long(regex):
        while not is_over.is_set():
            hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**5)  # beside which other threads run

    monkeypatch.setattr(service.served().rules, 'of_regex', takes_long)
    thread = threading.Thread(target=lambda: found.append(refused(regex='a')))
    thread.start()
    assert complete(client, prompt='x', max_tokens=4).status_code == 200 and not found
    thread.join()
    is_over.set()
    assert 'takes more than 1.8 s' in found[0]['message']
    # It is not the rule that takes long where the machine has no time for it.
    monkeypatch.setattr(constraints, '_SECONDS', 0.3)
    go = threading.Event()
    monkeypatch.setattr(
        service.served().rules, 'of_regex', lambda regex, read=rules.of_regex: go.wait(20) and read(regex)
    )
    timer = threading.Timer(1.0, go.set)
    timer.start()
    assert complete(client, prompt='x', max_tokens=4, regex='yes').json()['choices'][0]['text'] == 'yes'
    go.clear()
    monkeypatch.setattr(constraints, '_MAX_WAIT', 0.2)
    waited = client.post('/v1/completions', json={'model': 'toy', 'prompt': 'x', 'regex': 'yes'})
    go.set()
    assert waited.status_code == 503 and waited.headers['retry-after']


@pytest.mark.slow
def test_the_harness_reads_the_log_likelihoods_that_evaluation_finds(loaded, server):
    """lm-evaluation-harness's own reading of an answer, beside what `experiments.evaluate` scores with."""
    reading = pytest.importorskip('lm_eval.models.openai_completions', reason='needs lm_eval')
    client, _ = server
    model, params, _ = loaded
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(8):
        context, continuation = rng.integers(0, 256, size=rng.integers(1, 30)), rng.integers(0, 256, size=5)
        pairs.append(((256, *context.tolist()), tuple(continuation.tolist())))
    # One of them is what the model would say itself.
    greedy = complete(client, prompt=[list(pairs[0][0])], max_tokens=4, echo=True, logprobs=1).json()
    said = [
        ord(token)
        for token in greedy['choices'][0]['logprobs']['tokens'][len(pairs[0][0]) :]
        if len(token) == 1
    ]
    pairs[0] = pairs[0][0], tuple(said) or pairs[0][1]
    answer = client.post(
        '/v1/completions',
        json={
            'model': 'toy', 'prompt': [[*context, *rest] for context, rest in pairs], 'max_tokens': 1, 'logprobs': 1,
            'echo': True, 'temperature': 0, 'seed': 1234,
        },
    ).json()  # fmt: skip
    found = reading.LocalCompletionsAPI.parse_logprobs(answer, ctxlens=[len(context) for context, _ in pairs])
    wanted = dict(score(model, params, pairs))
    np.testing.assert_allclose(
        [value for value, _ in found], [wanted[i].log_probability for i in range(8)], atol=1e-4
    )
    assert [is_greedy for _, is_greedy in found] == [wanted[i].is_greedy for i in range(8)]
