"""One server of two processes: the answers of one process, and an end for both where one is gone."""

import asyncio
import json
import os
import signal
import threading

import httpx2
import pytest

from tests.serve.soak import Sizes, Soak
from tests.serve.started import started

# Of a context of 64.
SMALL = Sizes(('', 'Once upon a time', 'Lily had a'), (5, 20), left=40, large=56, child=24, logprobs=1)


@pytest.fixture
def server(commands, folder, shared_data):
    weights = shared_data / 'weights/stories260K'
    (folder / 'plain.jinja').write_text("{{ bos_token + messages[-1]['content'] }}")
    # A short context has few programs, which each process compiles before it is ready.
    flags = (
        '--mesh=tensor=4,data=2', '--slots=4', '--context=64', '--name=stories', '--top_logprobs=1', '--prefix_mib=0',
        f'--chat_template={folder}/plain.jinja',
    )  # fmt: skip
    job = {'num_processes': 2, 'num_devices': 4, 'seconds': 1000}
    with started(commands, weights / 'stories260K.gguf', *flags, **job) as server:
        yield server, json.loads((weights / 'expected.json').read_text())


def ends_both(server):
    os.kill(server.pids[0], signal.SIGTERM)
    assert [process.succeeded().status for process in server.ended.result(200)] == [0, 0]


def complete(client, expected, **more):
    asked = {'model': 'stories', 'prompt': expected['prompt'], 'temperature': 0, 'max_tokens': 40} | more
    return client.completions.create(**asked)


@pytest.mark.slow
def test_two_processes_answer_as_one_and_end_together(server):
    server, expected = server
    client, texts = server.client, []
    asked = [{}, {'stream': True}, {'stop': [' little']}, {'n': 2}, {'extra_body': {'regex': '(yes|no)'}}]
    asked.append({'messages': [{'role': 'user', 'content': expected['prompt']}]})

    def ask(more):
        if 'messages' in more:
            asked = {'model': 'stories', 'temperature': 0, 'max_tokens': 40} | more
            texts.append((more, client.chat.completions.create(**asked).choices[0].message.content))
            return
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
    assert not server.ended.done(), '\n'.join(process.stderr for process in server.ended.result())
    assert len(texts) == 14
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
    ends_both(server)


@pytest.mark.long
def test_many_clients_of_two_processes_leave_no_trace(server, shared_data):
    server, _ = server
    soak = Soak(server.address, SMALL.expected(shared_data / 'weights/stories260K/stories260K.gguf'), SMALL)
    with httpx2.Client(timeout=60) as http:
        asyncio.run(soak.each_once())
        # Eight devices of two cores take a second for a step.
        soak.leaves_no_trace(http, 16, 60, 20, ends_in=10)
    assert min(soak.counts.values()) > 3, soak.counts
    ends_both(server)


@pytest.mark.long
@pytest.mark.parametrize('gone', [0, 1])
def test_where_one_is_killed_the_other_ends_with_a_line(server, gone):
    server, expected = server
    assert complete(server.client, expected, max_tokens=4).choices[0].text
    os.kill(server.pids[gone], signal.SIGKILL)
    other = server.ended.result(30)[1 - gone]  # which does not go on alone
    assert other.status == 1 and 'Traceback' not in other.stderr
    assert 'start all of them again' in other.stderr.splitlines()[-1], other.stderr
