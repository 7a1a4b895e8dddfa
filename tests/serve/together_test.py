"""One server of two processes: the answers of one process, and an end for both where one is gone."""

import asyncio
import json
import os
import signal
import socket
import threading
import time

import httpx2
import openai
import pytest

from tests.command_line import wait_for
from tests.serve.command_test import get
from tests.serve.soak import Sizes, Soak

# Of a context of 64.
SMALL = Sizes(('', 'Once upon a time', 'Lily had a'), (5, 20), left=40, large=56, child=24, logprobs=1)


def start(commands, weights, port):
    # A short context has few programs, which each process compiles before it is ready.
    return commands.start_processes(
        'serve', f'--checkpoint={weights}/stories260K.gguf', f'--port={port}', '--mesh=tensor=4,data=2', '--slots=4',
        '--context=64', '--name=stories', '--top_logprobs=1', '--prefix_mib=0', num_processes=2, num_devices=4,
    )  # fmt: skip


@pytest.fixture
def server(commands, shared_data):
    weights = shared_data / 'weights/stories260K'
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    pids, ended = start(commands, weights, port), []
    waiter = threading.Thread(target=lambda: ended.extend(commands.wait_processes(pids, timeout=1400)))
    waiter.start()
    client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='any', max_retries=0)
    wait_for(lambda: get(client, 'ready') == 200 or not waiter.is_alive(), 1000)
    yield client, pids, waiter, ended, json.loads((weights / 'expected.json').read_text())
    for pid in pids if waiter.is_alive() else ():
        os.kill(pid, signal.SIGKILL)
    waiter.join()


def complete(client, expected, **more):
    asked = {'model': 'stories', 'prompt': expected['prompt'], 'temperature': 0, 'max_tokens': 40} | more
    return client.completions.create(**asked)


@pytest.mark.slow
def test_two_processes_answer_as_one_and_end_together(server):
    client, pids, waiter, ended, expected = server
    texts = []
    asked = [{}, {'stream': True}, {'stop': [' little']}, {'n': 2}, {'extra_body': {'regex': '(yes|no)'}}]

    def ask(more):
        answer = complete(client, expected, **more)
        if more.get('stream'):
            texts.append((more, ''.join(chunk.choices[0].text for chunk in answer)))
        else:
            texts.extend((more, choice.text) for choice in answer.choices)

    threads = [threading.Thread(target=ask, args=(more,)) for more in asked * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(texts) < 12:
        waiter.join(200)
    assert not ended, '\n'.join(process.stderr for process in ended)
    assert len(texts) == 12
    for more, text in texts:
        if 'extra_body' in more:
            assert text in ('yes', 'no')
        else:
            assert text and expected['greedy_text'].startswith(text)
            assert ('stop' in more) == (len(text) < 40)
    gone = complete(client, expected, max_tokens=50, stream=True, extra_body={'ignore_eos': True})
    next(iter(gone))
    gone.close()
    echoed = (
        complete(client, expected, prompt='One day', max_tokens=1, echo=True, logprobs=1).choices[0].logprobs
    )
    assert len(echoed.tokens) > 2 and all(-20 < value <= 0 for value in echoed.token_logprobs[1:])
    os.kill(pids[0], signal.SIGTERM)
    waiter.join(200)
    assert [process.succeeded().status for process in ended] == [0, 0]


@pytest.mark.long
def test_many_clients_of_two_processes_leave_no_trace(server, shared_data):
    client, pids, waiter, ended, _ = server
    address = str(client.base_url).removesuffix('/v1/')
    soak = Soak(address, SMALL.expected(shared_data / 'weights/stories260K/stories260K.gguf'), SMALL)
    with httpx2.Client(timeout=60) as http:
        asyncio.run(soak.each_once())
        # Eight devices of two cores take a second for a step.
        soak.leaves_no_trace(http, 16, 60, 20, ends_in=10)
    assert min(soak.counts.values()) > 3, soak.counts
    os.kill(pids[0], signal.SIGTERM)
    waiter.join(200)
    assert [process.succeeded().status for process in ended] == [0, 0]


@pytest.mark.long
@pytest.mark.parametrize('gone', [0, 1])
def test_where_one_is_killed_the_other_ends_with_a_line(server, gone):
    client, pids, waiter, ended, expected = server
    assert complete(client, expected, max_tokens=4).choices[0].text
    os.kill(pids[gone], signal.SIGKILL)
    began = time.monotonic()
    waiter.join(30)
    assert not waiter.is_alive(), 'it goes on alone'
    assert time.monotonic() - began < 30
    other = ended[1 - gone]
    assert other.status == 1 and 'Traceback' not in other.stderr
    assert 'start all of them again' in other.stderr.splitlines()[-1], other.stderr
