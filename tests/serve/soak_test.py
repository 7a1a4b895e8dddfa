"""64 clients at a time of the command: it makes no mistake, compiles nothing, and holds no more after than before."""

import asyncio
import os
import signal
import socket
import threading
import time

import httpx2
import pytest

import llama_jax
from tests.serve.command_test import wait_for
from tests.serve.soak import LENGTHS, PROMPTS, Soak, read_metrics


@pytest.fixture
def weights(shared_data):
    return shared_data / 'weights/stories260K/stories260K.gguf'


@pytest.fixture
def expected(weights):
    """{(prompt, tokens): the greedy text}."""
    config, params, tokenizer = llama_jax.load(weights)
    model = llama_jax.LlamaForCausalLM(config)
    found = {}
    for length in LENGTHS:
        texts = llama_jax.generate(model, params, tokenizer, PROMPTS, max_new_tokens=length, temperature=0.0)
        found |= {(prompt, length): text for prompt, text in zip(PROMPTS, texts, strict=True)}
    return found


@pytest.mark.parametrize(
    'seconds', [pytest.param(20, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.long)]
)
def test_many_clients_leave_no_trace(commands, weights, expected, seconds):
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
        before = read_metrics(http, address)
        assert before['llama_requests_cancelled_total'] == cancelled + 4, 'its answer was made to the end'
        sizes = []
        timer = threading.Timer(
            15, lambda: sizes.append(read_metrics(http, address)['process_resident_memory_bytes'])
        )
        timer.start()
        asyncio.run(soak.run(64, seconds))
        time.sleep(1)
        after = read_metrics(http, address)
        print(dict(soak.counts), sizes, {name: (before[name], after[name]) for name in before})
        assert not soak.wrong, soak.wrong[:5]
        assert min(soak.counts.values()) > 10, soak.counts
        assert after['llama_requests_running'] == after['llama_requests_waiting'] == 0
        assert after['llama_programs_compiled_total'] == 0
        assert 0 < after['llama_prompt_cached_tokens_total'] < after['llama_prompt_tokens_total']
        for name in ('process_open_fds', 'llama_arrays'):
            assert after[name] <= before[name], (name, before, after)
        assert after['process_resident_memory_bytes'] < 1.03 * sizes[0], (sizes, after)
    finally:
        os.kill(pid, signal.SIGTERM)
        waiter.join(60)
        http.close()
    assert ended[0].status == 0 and 'Traceback' not in ended[0].stderr, ended[0].stderr
