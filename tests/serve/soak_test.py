"""64 clients at a time of the command: it makes no mistake, compiles nothing, and holds no more after than before."""

import asyncio
import os
import signal
import socket
import threading
import time

import httpx2
import pytest

from tests.command_line import wait_for
from tests.serve.soak import Sizes, Soak, read_metrics


@pytest.fixture
def weights(shared_data):
    return shared_data / 'weights/stories260K/stories260K.gguf'


@pytest.mark.parametrize(
    'seconds', [pytest.param(20, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.long)]
)
def test_many_clients_leave_no_trace(commands, weights, seconds):
    expected = Sizes().expected(weights)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address, ended, http = f'http://127.0.0.1:{port}', [], httpx2.Client(timeout=30)
    pid = commands.start(
        'serve', f'--checkpoint={weights}', f'--port={port}', '--name=stories', '--context=512', '--slots=8'
    )
    waiter = threading.Thread(target=lambda: ended.append(commands.wait()))
    waiter.start()

    def is_ready():
        try:
            return not waiter.is_alive() or http.get(f'{address}/ready').status_code == 200
        except httpx2.TransportError:
            return False

    try:
        wait_for(is_ready, 300)
        soak = Soak(address, expected)
        asyncio.run(soak.each_once())  # what is made once is there then
        cancelled = read_metrics(http, address)['llama_requests_cancelled_total']
        asyncio.run(soak.stop_reading(lambda: not read_metrics(http, address)['llama_requests_running']))
        time.sleep(1)
        gone = read_metrics(http, address)['llama_requests_cancelled_total']
        assert gone == cancelled + 4, 'its answer was made to the end'
        soak.leaves_no_trace(http, 64, seconds, 15)
        assert min(soak.counts.values()) > 10, soak.counts
        after = read_metrics(http, address)
        assert 0 < after['llama_prompt_cached_tokens_total'] < after['llama_prompt_tokens_total']
    finally:
        os.kill(pid, signal.SIGTERM)
        waiter.join(60)
        http.close()
    assert ended[0].status == 0 and 'Traceback' not in ended[0].stderr, ended[0].stderr
