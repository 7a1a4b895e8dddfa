"""A real model behind the server: what it says is what `complete` says, and nothing is compiled after it is ready."""

import dataclasses
import json
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.inference.scoring import score_tokens
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.unstacked import unstack
from llama_jax.serve.served import Served, chat_of
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
    with serving(lambda: Served.create(model, params, tokenizer, chat_of(tokenizer, ''), **ROWS)) as both:
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
