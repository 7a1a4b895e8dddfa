"""llama.cpp's server, on a file of ours, answers the client of ours as we do."""

import socket
import subprocess
import sys

import openai
import pytest

import llama_jax
from tests.command_line import wait_for

PROMPTS = ('Once upon a time', 'Lily had a', 'The big dog was')


@pytest.mark.long
def test_it_completes_our_file_as_generate_does(commands, folder, shared_data):
    for name in ('llama_cpp', 'fastapi', 'starlette_context'):
        pytest.importorskip(name, reason='needs llama-cpp-python[server]')
    weights, file = shared_data / 'weights/stories260K', folder / 'model.gguf'
    commands.run(
        'convert', f'--input={weights}/stories260K.pt', f'--tokenizer={weights}/tok512.model', f'--output={file}',
        '--to=gguf', '--dtype=float32',
    ).succeeded()  # fmt: skip
    config, params, tokenizer = llama_jax.load(file)
    model = llama_jax.LlamaForCausalLM(config)
    expected = llama_jax.generate(model, params, tokenizer, PROMPTS, max_new_tokens=64, temperature=0.0)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            sys.executable, '-m', 'llama_cpp.server', '--model', file, '--model_alias', 'stories', '--port', str(port),
            '--n_ctx', '512', '--interrupt_requests', 'false',
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='any', max_retries=0)

    def answers():
        try:
            return [model.id for model in client.models.list()] == ['stories']
        except openai.APIConnectionError:
            return False

    try:
        wait_for(lambda: server.poll() is not None or answers(), 120)
        for prompt, text in zip(PROMPTS, expected, strict=True):
            asked = {
                'model': 'stories',
                'prompt': prompt,
                'max_tokens': 64,
                'temperature': 0,
                'extra_body': {'repeat_penalty': 1.0},
            }
            assert client.completions.create(**asked).choices[0].text == text
            pieces = client.completions.create(**asked, stream=True)
            assert ''.join(piece.choices[0].text for piece in pieces) == text
    finally:
        server.kill()
        server.wait()
