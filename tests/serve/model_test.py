"""The command around random weights: what it says to the official client is what `complete` says, and keeps to rules.

Nothing is compiled after it is ready.
"""

import json
import re
import shutil
import subprocess
import threading

import httpx2
import numpy as np
import openai
import pytest

import llama_jax
from llama_jax.inference.scoring import score, score_tokens
from llama_jax.models.unstacked import unstack
from tests.serve.schemas import SCHEMAS, SELL, SIZE, Step, fits
from tests.serve.serving import events, save_toy
from tests.serve.started import started

PROMPTS = ['Once', 'upon a time there', 'x', 'Zwölf Boxkämpfer jagen']
HI = {'model': 'toy', 'messages': [{'role': 'user', 'content': 'Hi'}], 'temperature': 2}
TEXT = 'Hello, wörld! 😀 so on'
CALL = '{"name": "sell", "parameters": {"size": "M"}}'
# Described as Llama 3.1 heard of them, functions take more room than this model has.
BRIEF = "{{ bos_token + messages[-1]['content'] }}"


@pytest.fixture(scope='module')
def loaded(folder):
    model, params, tokenizer = save_toy(folder / 'toy')
    (folder / 'brief.jinja').write_text(BRIEF)
    return model, unstack(params, model.dtype), tokenizer


@pytest.fixture(scope='module')
def wanted(loaded):
    return llama_jax.generate(*loaded, PROMPTS, max_new_tokens=20)


@pytest.fixture(scope='module')
def server(commands, folder, loaded):
    flags = '--slots=4', '--top_logprobs=5', '--prefix_mib=1', '--dtype=float32'
    with started(commands, folder / 'toy', *flags, f'--chat_template={folder}/brief.jinja') as server:
        yield server


@pytest.fixture(scope='module')
def client(server):
    with httpx2.Client(base_url=server.address, timeout=60) as client:
        yield client


@pytest.fixture
def official(server):
    """The official client; nothing that it asks for is compiled."""
    yield server.client
    assert '\nllama_programs_compiled_total 0.0\n' in server.metrics()


def complete(client, **body):
    response = client.post('/v1/completions', json={'model': 'toy', 'temperature': 0} | body)
    assert response.status_code == 200, response.text
    return response


def test_it_says_what_the_library_says_whole_streamed_and_at_a_time(wanted, client, official):
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


def test_echo_tells_of_each_token_of_the_prompt_and_one_more(loaded, client):
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


def test_beginnings_of_prompts_are_read_once(client):
    prompt = list(range(64, 127))[:60]
    first = complete(client, prompt=prompt, max_tokens=3).json()
    again = complete(client, prompt=prompt, max_tokens=3).json()
    assert first['choices'] == again['choices']
    assert again['usage']['prompt_tokens_details']['cached_tokens'] in (0, 32, 48)


def test_prometheus_finds_nothing_amiss(server):
    assert '\nllama_generated_tokens_total ' in server.metrics()
    if shutil.which('promtool'):
        subprocess.run(['promtool', 'check', 'metrics'], input=server.metrics().encode(), check=True)


def whole(answer):
    """An answer whose fields are those of the package's type, none of another kind."""
    assert type(answer).model_validate_json(answer.model_dump_json(by_alias=True), strict=True) is not None
    return answer


def forced(text):
    """So that the answer is this text."""
    return {'regex': re.escape(text)}


def test_the_official_client_lists_models_and_hears_of_errors(official):
    assert [whole(model).id for model in official.models.list()] == ['toy']
    assert whole(official.models.retrieve('toy')).owned_by == 'llama_jax'
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        official.models.retrieve('other')
    with pytest.raises(openai.NotFoundError) as error:
        official.chat.completions.create(**HI | {'model': 'other'})
    assert error.value.code == 'model_not_found' and error.value.param == 'model'
    with pytest.raises(openai.BadRequestError) as error:
        official.completions.create(model='toy', prompt='x' * 60, max_tokens=20)
    assert error.value.code == 'context_length_exceeded' and error.value.param == 'prompt'


def test_chats_whole_and_streamed_with_usage_stops_and_log_probabilities(official):
    create = official.chat.completions.create
    asked = HI | {'n': 2, 'seed': 3, 'logprobs': True, 'top_logprobs': 2, 'extra_body': forced(TEXT)}
    answer = whole(create(**asked))
    assert [choice.message.content for choice in answer.choices] == [TEXT] * 2
    assert {choice.finish_reason for choice in answer.choices} == {'stop'}
    told = answer.choices[0].logprobs.content
    assert bytes(byte for entry in told for byte in entry.bytes).decode() == TEXT
    assert [len(entry.top_logprobs) for entry in told] == [2] * len(told)
    assert all(-9999 <= entry.logprob <= 0 for entry in told)
    *pieces, usage = map(whole, create(**asked, stream=True, stream_options={'include_usage': True}))
    assert usage.choices == [] and usage.usage.completion_tokens == answer.usage.completion_tokens
    assert {piece.usage for piece in pieces} == {None}
    for row in (0, 1):
        own = [choice for piece in pieces for choice in piece.choices if choice.index == row]
        assert own[0].delta.role == 'assistant' and len(own) > 3
        assert ''.join(choice.delta.content or '' for choice in own) == TEXT
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ['stop']
        scores = [entry for choice in own if choice.logprobs for entry in choice.logprobs.content]
        assert [entry.logprob for entry in scores] == [
            entry.logprob for entry in answer.choices[row].logprobs.content
        ]
    stopped = create(**asked | {'stop': ['so', 'x']}).choices
    assert [choice.message.content for choice in stopped] == [TEXT.partition('so')[0]] * 2
    cut = create(**HI, max_completion_tokens=5, extra_body=forced(TEXT)).choices[0]
    assert cut.finish_reason == 'length' and cut.message.content == TEXT[:5]


def test_completions_whole_and_streamed(official):
    create = official.completions.create
    asked = {'model': 'toy', 'prompt': ['a', 'b'], 'temperature': 2, 'logprobs': 2, 'seed': 1}
    asked['extra_body'] = forced(TEXT)
    answer = whole(create(**asked))
    assert [choice.text for choice in answer.choices] == [TEXT] * 2
    # As long as an answer goes on, and before an echo's first token, that service tells null; the types know of none.
    *pieces, usage = create(**asked, stream=True, stream_options={'include_usage': True})
    assert (
        whole(usage).choices == []
        and usage.usage == answer.usage
        and {piece.usage for piece in pieces} == {None}
    )
    for row, choice in enumerate(answer.choices):
        own = [one for piece in pieces for one in piece.choices if one.index == row]
        assert ''.join(one.text for one in own) == TEXT and len(own) > 3
        offsets = [offset for one in own if one.logprobs for offset in one.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset
        assert r'bytes:\xc3' in choice.logprobs.tokens
    echoed = create(**asked | {'prompt': 'a'}, echo=True).choices[0]
    assert echoed.text == f'a{TEXT}' and echoed.logprobs.token_logprobs[0] is None


def test_tools_are_called_by_force_or_by_the_models_own_words(official):
    create = official.chat.completions.create
    named = {'type': 'function', 'function': {'name': 'sell'}}
    for choice in ('required', named, 'auto', None):
        asked = HI | {'tools': [SELL]} | ({'tool_choice': choice} if choice else {})
        own_words = {} if choice in ('required', named) else forced(CALL)
        (answer,) = whole(create(**asked, extra_body=own_words)).choices
        assert answer.finish_reason == 'tool_calls' and answer.message.content is None
        call = answer.message.tool_calls[0].function
        assert call.name == 'sell' and json.loads(call.arguments)['size'] in SIZE['enum']
        chunks = [whole(chunk).choices[0] for chunk in create(**asked, stream=True, extra_body=own_words)]
        deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert json.loads(''.join(delta.function.arguments for delta in deltas)).keys() == {'size'}
        assert chunks[-1].finish_reason == 'tool_calls' and not any(chunk.delta.content for chunk in chunks)
    (answer,) = create(**HI, tools=[SELL], extra_body=forced('It is sunny.')).choices
    assert answer.message.content == 'It is sunny.' and answer.finish_reason == 'stop'


def test_responses_whole_and_streamed_with_tools_and_schemas(official):
    create = official.responses.create
    asked = {'model': 'toy', 'input': 'Hi', 'temperature': 2}
    form = {'format': {'type': 'json_schema', 'name': 'x', 'schema': {'const': TEXT}}}
    answer = whole(create(**asked, text=form))
    assert json.loads(answer.output_text) == TEXT and answer.status == 'completed'
    *told, last = create(**asked, text=form, stream=True)
    deltas = [event.delta for event in told if event.type == 'response.output_text.delta']
    assert json.loads(''.join(deltas)) == TEXT and len(deltas) > 2
    assert last.type == 'response.completed' and whole(last.response).output_text == ''.join(deltas)
    assert last.response.usage.output_tokens == answer.usage.output_tokens
    tools = [{'type': 'function', 'strict': True} | SELL['function']]
    (call,) = whole(create(**asked, tools=tools, tool_choice='required')).output
    assert call.type == 'function_call' and json.loads(call.arguments)['size'] in SIZE['enum']
    told = list(create(**asked, tools=tools, tool_choice={'type': 'function', 'name': 'sell'}, stream=True))
    joined = ''.join(e.delta for e in told if e.type == 'response.function_call_arguments.delta')
    assert json.loads(joined)['size'] in SIZE['enum']
    parsed = official.responses.parse(**asked, text_format=Step)
    assert parsed.output_parsed.number < 100


def check_schemas(create, rounds):
    """Four answers to each of ten schemas a round: all end, and all are valid."""
    for number, schema in enumerate(SCHEMAS * rounds):
        kind = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema}}
        answer = create(**HI, response_format=kind, n=4, seed=number)
        assert {choice.finish_reason for choice in answer.choices} == {'stop'}
        for choice in answer.choices:
            value = json.loads(choice.message.content)
            assert fits(value, schema), (schema, choice.message.content)


@pytest.mark.slow
def test_all_of_two_hundred_answers_keep_to_schemas(official):
    check_schemas(official.chat.completions.create, rounds=5)


def test_answers_keep_to_schemas_regexes_and_grammars(client, official):
    check_schemas(official.chat.completions.create, rounds=1)
    parsed = official.chat.completions.parse(**HI, response_format=Step, seed=1)
    assert parsed.choices[0].message.parsed.number < 100
    answer = complete(client, prompt='x', temperature=2, regex='[ab]{2,4}', n=4, max_tokens=9).json()
    assert all(re.fullmatch('[ab]{2,4}', choice['text']) for choice in answer['choices'])
    streamed = complete(client, prompt='x', temperature=2, grammar='start: "on" | "off"', stream=True).text
    text = ''.join(json.loads(line)['choices'][0]['text'] for line in events(streamed)[:-1])
    assert text in ('on', 'off')


@pytest.mark.slow
def test_the_harness_reads_the_log_likelihoods_that_evaluation_finds(loaded, client):
    """lm-evaluation-harness's own reading of an answer, beside what `experiments.evaluate` scores with."""
    reading = pytest.importorskip('lm_eval.models.openai_completions', reason='needs lm_eval')
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
