"""Who comes, goes, reads slowly, or asks too much; what fails, hangs or ends: the model's thread beside the web."""

import asyncio
import json
import threading
import time

import jax
import pytest

from llama_jax import runtime
from llama_jax.errors import InputError
from llama_jax.inference.request import CompletionRequest
from llama_jax.serve import worker as worker_module
from llama_jax.serve.app import make_app
from llama_jax.serve.job import Job
from llama_jax.serve.refusal import Refusal
from llama_jax.serve.ticket import Piece, Ticket
from llama_jax.serve.worker import Asked
from tests.command_line import wait_for
from tests.serve.serving import Script, scripted, serving

USER = [{'role': 'user', 'content': 'Hi'}]
BODY = {'model': 'toy', 'prompt': 'a', 'max_tokens': 900}


def complete(client, **body):
    return client.post('/v1/completions', json=BODY | body)


async def call(app, body, reads, leaves=True):
    """What an application sends to a client that reads so many parts; it then leaves, or only stops reading."""
    parts, left = [], asyncio.Event()
    asked = [{'type': 'http.request', 'body': json.dumps(body).encode(), 'more_body': False}]

    async def receive():
        if asked:
            return asked.pop()
        await left.wait()
        return {'type': 'http.disconnect'}

    async def send(message):
        parts.append(message)
        if len(parts) > reads:
            if leaves:
                left.set()
            else:
                await asyncio.sleep(3600)

    headers = [(b'content-type', b'application/json'), (b'host', b'localhost')]
    scope = {
        'type': 'http', 'method': 'POST', 'path': '/v1/completions', 'raw_path': b'/v1/completions', 'headers': headers,
        'query_string': b'', 'root_path': '', 'scheme': 'http', 'http_version': '1.1', 'asgi': {'version': '3.0'},
    }  # fmt: skip
    if not leaves:
        task = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(1.0)
        task.cancel()
        return parts
    if not reads:
        left.set()
    await app(scope, receive, send)
    return parts


@pytest.mark.parametrize('body', [{'stream': True}, {}])
def test_a_client_that_goes_away_frees_its_slot(body):
    script = Script('x' * 900, steps=1, hold=lambda: time.sleep(0.02))  # 18 s, if nobody went away
    with serving(lambda: scripted(script)) as (_, service):
        asyncio.run(call(make_app(service), BODY | {'n': 2} | body, reads=3 if body else 0))
        wait_for(lambda: len(script.cancelled) == 2)
        wait_for(lambda: service.worker.num_rows == 0)
        assert b'requests_cancelled_total 2.0' in service.metrics.render()


def test_a_client_that_stops_reading_frees_its_slot_and_little_waits_for_it():
    script = Script('x' * 5000, steps=500, hold=lambda: time.sleep(0.001))
    with serving(lambda: scripted(script, context=10**4)) as (_, service):
        asyncio.run(
            call(make_app(service), BODY | {'stream': True, 'max_tokens': 5000}, reads=3, leaves=False)
        )
        wait_for(lambda: script.cancelled == [0])
        assert len(script.asked) == 1 and service.worker.num_rows == 0


def test_what_is_told_at_once_does_not_wait_for_a_client():
    async def read():
        ticket = Ticket(1, lambda: cancelled.append(1), is_streamed=True, prompt_tokens=1)
        large, pieces = Piece(0, 'x' * 200_000, 1), ticket.pieces()
        for _ in range(3):
            ticket.put([large])
            assert await anext(pieces) == large
        assert not cancelled
        ticket.put([large])
        ticket.put([large])
        assert cancelled == [1] and await anext(pieces) == large
        with pytest.raises(Refusal, match='too slowly'):
            await anext(pieces)

    cancelled = []
    asyncio.run(read())


def test_the_model_waits_for_what_passes_its_tokens_on():
    """Else tokens that nobody has had time for would count as those of a slow client."""
    script, ahead = Script('x' * 900, steps=1), []
    with serving(lambda: scripted(script)) as (_, service):

        async def read():
            ticket = service.worker.submit([Asked(CompletionRequest([1], 900), (), 1)], is_streamed=True)
            async for _ in ticket.pieces():
                before = script.num_steps
                time.sleep(0.1)
                ahead.append(script.num_steps - before)
                if len(ahead) == 3:
                    break
            ticket.close()

        asyncio.run(read())
    assert max(ahead) <= 2


def test_too_much_at_a_time_is_sent_away_and_may_come_again():
    go = threading.Event()
    script = Script('Hello', slots=2, hold=lambda: go.wait(60))
    with serving(lambda: scripted(script), max_queue=3) as (client, service):
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(complete(client))) for _ in range(5)]
        for thread in threads:
            thread.start()
        wait_for(lambda: service.worker.num_rows == 5)
        refused = complete(client)
        assert refused.status_code == 429 and int(refused.headers['retry-after']) > 0
        assert refused.json()['error']['code'] == 'queue_full'
        streams = {
            'completions': {'prompt': 'a'},
            'chat/completions': {'messages': USER},
            'responses': {'input': 'a'},
        }
        for path, asked in streams.items():
            response = client.post(f'/v1/{path}', json={'model': 'toy', 'stream': True} | asked)
            assert response.status_code == 429, path
        assert complete(client, prompt=['a'] * 6).status_code == 400  # it would never fit
        go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 5
        assert complete(client).status_code == 200
        assert b'requests_refused_total{reason="queue_full"} 4.0' in service.metrics.render()


def test_while_it_loads_or_ends_it_lives_and_sends_away():
    loaded = threading.Event()

    def load():
        assert loaded.wait(60)
        return scripted(Script('Hello'))

    timer = threading.Timer(0.5, loaded.set)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, 'sleep', lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
        timer.start()
        with serving(load) as (client, service):
            assert complete(client).status_code == 200
            service.worker.served, served = None, service.worker.served
            assert client.get('/health').status_code == 200 and client.get('/ready').status_code == 503
            sent_away = complete(client)
            assert sent_away.status_code == 503 and sent_away.headers['retry-after']
            service.worker.served = served
            service.is_draining = True
            assert client.get('/health').status_code == 200
            assert complete(client).json()['error']['code'] == 'draining'


def test_a_step_that_fails_is_its_requests_failure_alone_and_a_second_one_the_servers():
    fails, failures, scores = threading.Event(), [], []

    def hold():
        if fails.is_set():
            fails.clear()
            scores.append(service.worker.score([1]))  # it waits for its turn
            raise ZeroDivisionError('in a step')

    script = Script('Hello', hold=hold)
    with serving(lambda: scripted(script)) as (client, service):
        assert complete(client).status_code == 200
        fails.set()
        failed = complete(client)
        assert failed.status_code == 500 and failed.json()['error']['type'] == 'server_error'
        assert 'ZeroDivision' not in failed.text and service.worker.failure is None
        assert scores[0].exception(60).status == 500  # cancelled, nobody would answer
        assert complete(client).json()['choices'][0]['text'] == 'Hello'
        fails.set()
        streamed = client.post('/v1/completions', json=BODY | {'stream': True})
        assert 'error' in streamed.text and '[DONE]' not in streamed.text
        wait_for(lambda: service.worker.failure is not None)
        assert client.get('/health').status_code == 503 and complete(client).status_code == 503
        assert not failures


def test_what_breaks_off_in_a_stream_is_an_event():
    steps = iter(range(3))
    script = Script('Hello there', hold=lambda: next(steps))
    with serving(lambda: scripted(script)) as (client, _):
        text = client.post('/v1/completions', json=BODY | {'stream': True}).text
        assert 'Hel' in text and 'event: error' in text and '[DONE]' not in text


def test_a_thread_that_is_held_is_seen(monkeypatch):
    monkeypatch.setattr(worker_module, '_STALL_SECONDS', 0.3)
    go = threading.Event()
    with serving(lambda: scripted(Script('Hello', hold=lambda: go.wait(60)))) as (client, _):
        assert client.get('/health').status_code == 200
        thread = threading.Thread(target=lambda: complete(client))
        thread.start()
        wait_for(lambda: client.get('/health').status_code == 503)
        go.set()
        thread.join()
        wait_for(lambda: client.get('/health').status_code == 200)


def test_what_cannot_be_loaded_is_a_failure():
    def load():
        raise FileNotFoundError('nothing there')

    with pytest.raises(FileNotFoundError), serving(load):
        pass


def test_what_one_process_refuses_all_refuse(monkeypatch):
    """Else what a request had changed before it was refused would be changed in one of them alone."""

    class Refuses(Script):
        def submit(self, request):
            number = super().submit(request)
            if len(request.tokens) > 2:
                self.cancel(number)
                raise InputError('too long')
            return number

    told, scripts = [], [Refuses('Hello'), Refuses('Hello')]
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(runtime, 'bytes_from_main_process', told.append)
    first = Job(scripted(scripts[0]), scripts[0])
    del told[:]
    with pytest.raises(InputError):
        first.submit(CompletionRequest([1, 2, 3], 9), ())
    number, watch = first.submit(CompletionRequest([1, 2], 9), ('l',))
    while first.advance():
        pass
    first.end()
    assert watch.new_text(at_end=True) == 'He'
    monkeypatch.setattr(runtime, 'bytes_from_main_process', lambda data: data or told.pop(0))
    Job(scripted(scripts[1]), scripts[1]).follow()
    for script in scripts:
        assert [request.tokens for request in script.asked] == [[1, 2, 3], [1, 2]]
        assert script.num_steps == scripts[0].num_steps and not script.rows and script.cancelled == [0]


def test_keys_take_turns():
    script = Script('Hello')
    with serving(lambda: scripted(script), keys=('sesame-1234', 'other-12345')) as (client, _):
        for key in ('sesame-1234', 'other-12345'):
            client.post('/v1/completions', json=BODY, headers={'authorization': f'Bearer {key}'})
        first, second = script.asked
        assert first.key != second.key and 'sesame' not in first.key
