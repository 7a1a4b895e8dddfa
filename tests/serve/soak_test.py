"""64 clients at a time of the command: it makes no mistake, compiles nothing, and holds no more after than before."""

import asyncio
import time

import httpx2
import pytest

from tests.serve.soak import Sizes, Soak, read_metrics
from tests.serve.started import started


@pytest.fixture
def weights(shared_data):
    return shared_data / 'weights/stories260K/stories260K.gguf'


@pytest.mark.parametrize(
    'seconds', [pytest.param(20, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.long)]
)
def test_many_clients_leave_no_trace(commands, weights, seconds):
    expected = Sizes().expected(weights)
    flags = '--name=stories', '--context=512', '--slots=8'
    with started(commands, weights, *flags) as server, httpx2.Client(timeout=30) as http:
        soak = Soak(server.address, expected)
        asyncio.run(soak.each_once())  # what is made once is there then
        cancelled = read_metrics(http, server.address)['llama_requests_cancelled_total']
        asyncio.run(
            soak.stop_reading(lambda: not read_metrics(http, server.address)['llama_requests_running'])
        )
        time.sleep(1)
        gone = read_metrics(http, server.address)['llama_requests_cancelled_total']
        assert gone == cancelled + 4, 'its answer was made to the end'
        soak.leaves_no_trace(http, 64, seconds, 15)
        assert min(soak.counts.values()) > 10, soak.counts
        after = read_metrics(http, server.address)
        assert 0 < after['llama_prompt_cached_tokens_total'] < after['llama_prompt_tokens_total']
        server.end().succeeded()
