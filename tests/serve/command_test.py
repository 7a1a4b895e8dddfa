"""The command itself: what it refuses, what it says of the small real model, and how it ends."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import time

import openai
import pytest

from tests.command_line import wait_for
from tests.serve.started import started

FILE = 'stories260K.gguf'


@pytest.fixture(scope='module')
def weights(shared_data):
    return shared_data / 'weights/stories260K'


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--checkpoint=DIR', '--host=0.0.0.0'], '--host=0.0.0.0 is reached by others .* --api_keys=FILE'),
        (['--checkpoint=DIR', '--api_keys=DIR/keys'], 'keys line 2 is no key'),
        (['--checkpoint=DIR', '--top_logprobs=21'], '21; there may be from 0'),
        (['--checkpoint=DIR', '--draft_tokens=3'], '--draft_tokens is of --draft, which is not given'),
        (['--checkpoint=DIR/nothing', '--port=0'], 'nothing'),
        (['--checkpoint=DIR', '--port=TAKEN'], '--port .* cannot be listened on: .*; give another'),
    ],
)
def test_what_is_wrong_is_one_line(commands, folder, flags, words):
    (folder / 'keys').write_text('# of two\nshort\n')
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = commands.run(
            'serve', *(flag.replace('DIR', str(folder)).replace('TAKEN', port) for flag in flags)
        )
    assert done.status == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith('error: ') and re.search(words, last) and 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    ('template', 'words'),
    [
        ('wrong.jinja', 'cannot render'),
        pytest.param('bytes.jinja', 'no text in UTF-8', marks=pytest.mark.slow),
        pytest.param('nothing.jinja', 'nothing.jinja', marks=pytest.mark.slow),
        pytest.param('checkpoint', 'has no template', marks=pytest.mark.slow),
    ],
)
def test_a_template_that_is_none_ends_it(commands, folder, weights, template, words):
    for name, content in (('bytes', b'\xff'), ('wrong', b'{% if %}')):
        (folder / f'{name}.jinja').write_bytes(content)
    path = template if template == 'checkpoint' else folder / template
    given = f'--checkpoint={weights}/stories260K.gguf', '--port=0', f'--chat_template={path}'
    done = commands.run('serve', *given)
    last = done.stderr.splitlines()[-1]
    assert done.status == 2 and re.search(f'^error: .*{words}.*--chat_template', last), done.stderr


@pytest.mark.slow
def test_it_serves_the_real_model_and_lets_running_answers_end(commands, folder, weights):
    (folder / 'plain.jinja').write_text("{{ bos_token + messages[-1]['content'] }}")
    given = (
        '--slots=2', '--draft=lookup', '--name=stories', '--prefix_mib=0', '--top_logprobs=0', '--context=512',
    )  # fmt: skip
    with started(commands, weights / FILE, *given, f'--chat_template={folder}/plain.jinja') as server:
        client = server.client
        expected = json.loads((weights / 'expected.json').read_text())
        asked = {
            'model': 'stories', 'prompt': expected['prompt'], 'temperature': 0,
            'max_tokens': expected['max_new_tokens'],
        }  # fmt: skip
        whole = client.completions.create(**asked)
        assert whole.choices[0].text == expected['greedy_text']
        pieces = client.completions.create(**asked, stream=True)
        assert ''.join(piece.choices[0].text for piece in pieces) == expected['greedy_text']
        said = {name: value for name, value in asked.items() if name != 'prompt'}
        said['messages'] = [{'role': 'user', 'content': expected['prompt']}]
        answer = client.chat.completions.create(**said)
        assert answer.choices[0].message.content == expected['greedy_text']
        pieces = client.chat.completions.create(**said, stream=True)
        assert ''.join(piece.choices[0].delta.content or '' for piece in pieces) == expected['greedy_text']
        counted = dict(line.split(' ') for line in server.metrics().splitlines() if line[0] != '#')
        drafted, taken = (float(counted[f'llama_draft_tokens{x}_total']) for x in ('', '_accepted'))
        assert drafted > taken > 0
        stream = client.completions.create(
            **asked | {'max_tokens': 500}, extra_body={'ignore_eos': True}, stream=True
        )
        next(iter(stream))
        os.kill(server.pids[0], signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == 'length'
        done = server.done()
    assert done.status == 0, done.stderr
    assert 'Traceback' not in done.stderr and expected['greedy_text'][:40] not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(('again', 'seconds', 'status'), [(False, 30, 0), (True, 2, 128 + signal.SIGTERM)])
def test_it_ends_though_answers_go_on_and_at_once_when_told_again(commands, weights, again, seconds, status):
    given = (
        '--slots=1', '--name=stories', '--prefix_mib=0', '--top_logprobs=0', '--max_queue=39', '--context=512',
    )  # fmt: skip
    with started(commands, weights / FILE, *given, f'--drain_seconds={600 if again else 1}') as server:
        create = server.client.completions.create
        asked = {'model': 'stories', 'max_tokens': 500, 'extra_body': {'ignore_eos': True}}
        waits = {'prompt': ['Once'] * 20, 'stream': True, 'echo': True}
        unread, heard = (create(**asked, **waits) for _ in range(2))  # rows one after the other
        with pytest.raises(openai.RateLimitError, match='39 answers wait already') as full:
            create(**asked, prompt='Once')
        os.kill(server.pids[0], signal.SIGTERM)
        wait_for(lambda: server.get('ready') == 503, 10)
        with pytest.raises(openai.InternalServerError, match='503') as draining:
            create(**asked, prompt='Once')
        for error in (full, draining):
            assert int(error.value.response.headers['retry-after']) > 0
        began = time.monotonic()
        if not again:
            with pytest.raises(openai.APIError, match='the server has ended before the answer'):
                list(heard)
        done = server.end() if again else server.done()
        unread.close()
    assert done.status == status and time.monotonic() - began < seconds, done.stderr
    assert 'Traceback' not in done.stderr


# 13 tokens are never begun, and 14 after a while.
HOOK = """
import time
from llama_jax.inference.generator import Generator
submit = Generator.submit
def odd(self, asked):
    if asked.max_new_tokens == 13:
        raise ZeroDivisionError('of a hook')
    time.sleep(12 * (asked.max_new_tokens == 14))
    return submit(self, asked)
Generator.submit = odd
"""


@pytest.mark.slow
def test_what_holds_the_model_is_seen_and_what_fails_twice_ends_the_server(commands, weights):
    given = '--slots=1', '--name=stories', '--prefix_mib=0', '--top_logprobs=0', '--context=64'
    with started(commands, weights / FILE, *given, before=HOOK) as server:

        def ask(max_tokens, **more):
            asked = {'model': 'stories', 'prompt': 'Once', 'max_tokens': max_tokens} | more
            return server.client.completions.create(**asked, extra_body={'ignore_eos': True})

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            held = pool.submit(ask, 14)
            wait_for(lambda: server.get('health') == 503, 10)
            assert held.result(60).usage.completion_tokens == 14
        wait_for(lambda: server.get('health') == 200, 10)
        stream = iter(ask(40, stream=True))
        next(stream)
        with pytest.raises(openai.InternalServerError, match='failed at this request'):
            ask(13)
        with pytest.raises(openai.APIError, match='failed at this request'):
            list(stream)
        assert ask(3).usage.completion_tokens == 3
        with pytest.raises(openai.InternalServerError, match='failed at this request'):
            ask(13)
        assert server.get('health') in (503, 0)
        done = server.done()
    assert done.status == 1 and 'ZeroDivisionError: of a hook' in done.stderr


@pytest.mark.slow
def test_a_signal_ends_it_while_it_loads(commands, folder, weights):
    with started(commands, weights / FILE, until='health') as server:
        assert server.get('tokenizer_info') == server.get('ready') == 503
        wait_for(lambda: 'attention: ' in (folder / '0.stderr').read_text(), 120)  # so it compiles
        time.sleep(0.5)
        assert server.get('ready') == 503, 'it has loaded already'
        began = time.monotonic()
        done = server.end().succeeded()
        assert time.monotonic() - began < 30
    assert not any(word in done.stderr.lower() for word in ('error', 'fatal', 'terminate')), done.stderr


@pytest.mark.slow
def test_completions_of_the_command_keep_to_a_rule(commands, folder, weights):
    (folder / 'schema.json').write_text(json.dumps({'enum': ['cat', 'dog']}))
    given = [f'--checkpoint={weights}/stories260K.gguf', '--prompt=Once', '--prompt=He', '--temperature=1.5']
    shown = commands.run('generate', *given, f'--schema={folder}/schema.json').succeeded().stdout
    assert len(lines := shown.split()) == 2 and set(lines) <= {'"cat"', '"dog"'}
    for flags, words in (
        (['--regex=(a'], 'cannot be used'), (['--regex=a', '--draft=lookup'], 'go without --draft'),
        (['--regex=a', f'--grammar={folder}/schema.json'], 'both given'),
    ):  # fmt: skip
        assert words in commands.run('generate', *given, *flags).error()
