"""Bodies that are nearly right: whatever is changed in one, it is answered or refused, and nobody else hears of it."""

import copy
import json
import random
import threading

import httpx2
import pytest

from llama_jax.serve.bodies import ChatBody, CompletionBody
from llama_jax.serve.parameters import HARMLESS, REFUSED
from llama_jax.serve.responses import ResponseBody
from tests.command_line import wait_for
from tests.serve.serving import events, save_toy
from tests.serve.soak import read_metrics
from tests.serve.started import started

TOOL = {'name': 'weather', 'parameters': {'type': 'object', 'properties': {'place': {'type': 'string'}}}}
TALK = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]},
]
BODIES = {
    '/v1/completions': [
        {'model': 'toy', 'prompt': ['ab', 'cd'], 'max_tokens': 3, 'logprobs': 2, 'echo': True, 'n': 2},
        {'model': 'toy', 'prompt': [[1, 2], [3]], 'stream': True, 'stop': ['l'], 'logit_bias': {'7': -1.5}, 'seed': 3},
        {'model': 'toy', 'prompt': 'ab', 'regex': 'a+', 'top_p': 0.5, 'temperature': 0.7, 'top_k': 4},
    ],
    '/v1/chat/completions': [
        {'model': 'toy', 'messages': TALK, 'logprobs': True, 'top_logprobs': 3, 'n': 2, 'presence_penalty': 1.0},
        {'model': 'toy', 'messages': TALK, 'tool_choice': 'required',
         'tools': [{'type': 'function', 'function': TOOL}]},
        {'model': 'toy', 'messages': TALK, 'stream': True, 'stream_options': {'include_usage': True},
         'response_format': {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': TOOL['parameters']}}},
    ],
    '/v1/responses': [
        {'model': 'toy', 'input': 'Hi', 'instructions': 'Be brief.', 'max_output_tokens': 4},
        {'model': 'toy', 'input': [{'role': 'user', 'content': 'Hi'}], 'stream': True,
         'tools': [{'type': 'function'} | TOOL]},
    ],
    '/tokenize': [{'prompt': '<|begin_of_text|>ab', 'add_special_tokens': False}],
    '/detokenize': [{'tokens': [97, 256, 98]}],
}  # fmt: skip
FIELDS = sorted(
    {name for body in (ChatBody, CompletionBody, ResponseBody) for name in body.model_fields} | HARMLESS | REFUSED
)  # fmt: skip
NESTED = json.loads('[' * 200 + ']' * 200)
ODD = (
    None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e308, -1e308, 5e-324, float('nan'), float('inf'), 2**31, 2**63, 2**64,
    -(2**63) - 1, 10**400, '', 'a', '\0', '\ud800', '<|eot_id|>', '🦙' * 9, 'x' * 3000, '9' * 5000, '(a', '.*' * 99, [],
    {}, [[]], [None], ['a', 1], {'a': 1}, {'': None}, {'9' * 5000: 1}, {'type': 'object'}, {'$ref': '#'}, NESTED,
)  # fmt: skip


def places(value):
    """(container, key) of everything within."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(items):
        yield value, key
        yield from places(one)


def mutated(draw, body):
    """The bytes of a body in which a few things are changed."""
    body = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        container, key = draw.choice(list(places(body)) or [(body, 'model')])
        kind = draw.randrange(5)
        if kind == 0 and key in container:
            del container[key]
        elif kind == 1:
            body[draw.choice(FIELDS)] = copy.deepcopy(draw.choice(ODD))
        elif kind == 2 and isinstance(container, list):
            container.append(copy.deepcopy(draw.choice(ODD)))
        elif kind == 3 and isinstance(container, dict):
            container[draw.choice((*container, 'type', 'x'))] = copy.deepcopy(
                draw.choice(list(container.values()) or [1])
            )
        else:
            container[key] = copy.deepcopy(draw.choice(ODD))
    data = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.5).encode(errors='surrogatepass'))
    if draw.random() < 0.2:
        for _ in range(draw.randint(1, 4)):
            begin = draw.randrange(len(data) + 1)
            data[begin : begin + draw.randrange(3)] = draw.randbytes(draw.randrange(4))
    return bytes(data)


def check(response):
    """It is an answer, whole, or one error object, and all of its numbers are finite."""

    def refuse(name):
        raise AssertionError(f'{name} in {response.text}')

    def read(text):
        return json.loads(text, parse_constant=refuse)

    if response.status_code != 200:
        assert 400 <= response.status_code < 500, response.text
        assert read(response.text)['error'].keys() == {'message', 'type', 'param', 'code'}
    elif response.headers['content-type'].startswith('text/event-stream'):
        pieces = events(response.text)
        assert pieces, response.text
        for piece in pieces:
            assert piece == '[DONE]' or 'error' not in read(piece) or read(piece)['error'] is None, (
                response.text
            )
    else:
        read(response.text)


# Answers long to whom it is to be, and briefly to all others.
HOOK = """
import time
from llama_jax.inference.constraint import Rules
from llama_jax.serve.served import Served
from tests.serve.serving import Script, make_tokenizer, scripted
class Neighbours(Script):
    def submit(self, request):
        self.answers = ['x' * 900] if request.max_new_tokens == 900 else ['Hello']
        self.asked.clear()
        return super().submit(request)
tokenizer = make_tokenizer()
served = scripted(Neighbours(hold=lambda: time.sleep(0.001)), tokenizer, rules=Rules(tokenizer, 512))
Served.create = lambda *args, **options: served
"""


@pytest.mark.parametrize(
    'number', [pytest.param(600, marks=pytest.mark.slow), pytest.param(20_000, marks=pytest.mark.long)]
)
def test_what_is_nearly_right_is_answered_or_refused(commands, folder, number):
    if not (folder / 'toy').exists():
        save_toy(folder / 'toy')
    statuses, heard, is_over, sizes = set(), [], threading.Event(), []
    with started(commands, folder / 'toy', '--max_body=20000', before=HOOK) as server:

        def listen():
            asked = {'model': 'toy', 'prompt': 'a', 'max_tokens': 900, 'stream': True}
            while not is_over.is_set():
                told = server.client.completions.create(**asked)
                heard.append(''.join(piece.choices[0].text for piece in told))

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            with httpx2.Client(base_url=server.address, timeout=60) as client:
                for seed in range(number):
                    draw = random.Random(seed)
                    path = draw.choice(list(BODIES))
                    body = mutated(draw, draw.choice(BODIES[path]))
                    response = client.post(path, content=body, headers={'content-type': 'application/json'})
                    try:
                        check(response)
                    except Exception as error:
                        error.add_note(f'at seed {seed}: {path} {body[:2000]!r}')
                        raise
                    statuses.add(response.status_code)
                    if seed % 1000 == 999:
                        sizes.append(read_metrics(client, server.address)['process_resident_memory_bytes'])
        finally:
            is_over.set()
            listener.join()
        assert server.get('health') == 200
        wait_for(lambda: not read_metrics(httpx2, server.address)['llama_requests_running'])
        server.end().succeeded()
    assert {200, 400} <= statuses
    assert heard and {len(text) for text in heard} == {900}
    if sizes:  # where the first thousands have filled what is kept
        assert sizes[-1] < 1.03 * sizes[len(sizes) // 4], sizes
