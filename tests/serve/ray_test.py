"""Two replicas behind one address: one is killed, and what it was not running is answered."""

import collections
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import openai
import pytest

from tests.command_line import REPOSITORY, wait_for

CLIENTS = 4
# `serve run` listens on 8000, where others may; what it starts finds Ray Serve on another port.
ELSEWHERE = """
from ray import serve
from experiments.serve_ray import app
serve.start(http_options={{'port': {port}}})
"""


def replicas():
    listed = subprocess.run(['ps', '-eo', 'pid,args'], capture_output=True, text=True, check=True).stdout
    return {int(line.split()[0]) for line in listed.splitlines() if 'ray::ServeReplica' in line}


@pytest.fixture
def client(shared_data, tmp_path):
    pytest.importorskip('ray.serve', reason='needs the extra ray')
    checkpoint = shared_data / 'weights/stories260K/stories260K.gguf'
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    (tmp_path / 'elsewhere.py').write_text(ELSEWHERE.format(port=port))
    environment = os.environ | {'RAY_USAGE_STATS_ENABLED': '0', 'PYTHONPATH': str(REPOSITORY)}
    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen(
            [
                pathlib.Path(sys.executable).with_name('serve'), 'run', 'elsewhere:app',
                f'checkpoint={checkpoint}',
                'replicas=2', 'context=256', 'name=stories',
            ],
            cwd=tmp_path, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='any', max_retries=0)

    def answers():
        try:
            return process.poll() is not None or [model.id for model in client.models.list()] == ['stories']
        except (openai.APIConnectionError, openai.APIStatusError):
            return False

    try:
        wait_for(answers, 300)
        assert process.poll() is None, (tmp_path / 'log').read_text()[-2000:]
        yield client
    finally:
        client.close()
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.mark.long
def test_one_of_two_is_killed_and_comes_back(client):
    before, answered, failed, lock = replicas(), collections.Counter(), [], threading.Lock()
    left = list(range(200))

    def ask():
        while left:
            number = left.pop()
            try:
                asked = {'prompt': 'Once upon a time', 'max_tokens': 40, 'temperature': 0}
                text = client.completions.create(model='stories', **asked).choices[0].text
                with lock:
                    answered[text] += 1
            except openai.APIStatusError as error:
                failed.append(error)
            if number == 140:
                os.kill(min(before), signal.SIGKILL)

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(before) == 2 and len(answered) == 1
    assert len(failed) < CLIENTS and answered.total() + len(failed) == 200, failed
    wait_for(lambda: len(replicas() - before) == 1 and len(replicas()) == 2, 120)
