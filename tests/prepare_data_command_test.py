"""Prepared by any number of workers, killed at any moment: the same bytes."""

import json
import os
import pathlib
import random
import signal
import time

import pytest

from llama_jax.data.prepare import WORK
from tests.command_line import children


@pytest.fixture(scope='module')
def command(commands, corpus, folder):
    """The arguments of a preparation of some 25 units, but for its output."""
    from llama_jax.data.datasets import train_tokenizer

    documents = corpus.read_text().split('\n<|endoftext|>\n') * 30
    for number in range(3):
        lines = [json.dumps({'text': f'{place} {text}'}) for place, text in enumerate(documents[number::3])]
        (folder / f'part{number}.jsonl').write_text('\n'.join(lines))
    train_tokenizer([str(corpus)], 320, folder / 'tokenizer.model')
    return [
        f'--input={folder}/part*.jsonl', f'--tokenizer={folder}/tokenizer.model', '--seq_len=64', '--unit_bytes=30000'
    ]  # fmt: skip


def contents(output):
    return {
        os.path.relpath(os.path.join(above, name), output): (pathlib.Path(above) / name).read_bytes()
        for above, _, names in os.walk(output)
        for name in names
    }


@pytest.fixture(scope='module')
def whole(commands, command, folder):
    output = folder / 'whole'
    commands.run('prepare_data', *command, f'--output={output}', '--num_workers=1').succeeded()
    return contents(output)


def finished_tasks(output):
    return len(list((output / WORK).glob('*'))) if (output / WORK).exists() else 0


@pytest.mark.slow
def test_killed_at_any_moment_with_any_number_of_workers_it_writes_the_same_bytes(
    commands, command, whole, tmp_path
):
    assert len(whole) > 40  # rows and origins of each unit
    rng, output = random.Random(0), tmp_path / 'out'
    for kill in range(4):
        pid = commands.start('prepare_data', *command, f'--output={output}', f'--num_workers={1 + kill % 3}')
        enough, end = finished_tasks(output) + rng.randint(1, 4), time.monotonic() + 120
        while finished_tasks(output) < enough and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        assert commands.wait().status == -signal.SIGKILL, f'it had ended before kill {kill}'
    commands.run('prepare_data', *command, f'--output={output}', '--num_workers=2').succeeded()
    assert contents(output) == whole


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_one_more_try(commands, command, whole, tmp_path):
    output = tmp_path / 'out'
    pid, end = (
        commands.start('prepare_data', *command, f'--output={output}', '--num_workers=2'),
        time.monotonic() + 120,
    )
    while finished_tasks(output) < 3 and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(children(pid)[0], signal.SIGKILL)
    finished = commands.wait().succeeded()
    assert 'a worker ended by signal 9 at' in finished.stderr and 'it is tried once more' in finished.stderr
    assert contents(output) == whole
