"""Prepared by any number of workers, killed at any moment: the same bytes."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import time

import pytest
import zstandard

from configs import prepare_data, pretrain
from llama_jax.data.prepare import WORK
from llama_jax.data.prepared import PreparedRows
from tests.command_line import REPOSITORY, children, run_python


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


def await_tasks(output, more):
    """Returns when so many more tasks are done."""
    enough, end = finished_tasks(output) + more, time.monotonic() + 120
    while finished_tasks(output) < enough and time.monotonic() < end:
        time.sleep(0.002)
    assert finished_tasks(output) >= enough, 'it has ended, or stands still'


def units_done(output):
    """{record of a unit: what tells whether it was written again}."""
    return {file.name: file.stat().st_ino for file in (output / WORK).glob('unit-*.json')}


@pytest.mark.parametrize(
    'kills', [pytest.param(4, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)]
)
def test_killed_at_any_moment_with_any_number_of_workers_it_writes_the_same_bytes(
    commands, command, whole, tmp_path, kills
):
    assert len(whole) > 40  # rows and origins of each unit
    rng, output, done = random.Random(0), tmp_path / 'out', {}
    if kills > 4:  # some three hundred units: on a busy core many are done between two looks
        command = [*command[:-1], '--unit_bytes=2500']
        commands.run('prepare_data', *command, f'--output={tmp_path}/whole', '--num_workers=1').succeeded()
        whole = contents(tmp_path / 'whole')
    for kill in range(kills):
        given = [*command, f'--output={output}', f'--num_workers={1 + kill % 3}']
        pid = commands.start('prepare_data', *given, before='import os; os.setpgrp()')
        await_tasks(output, rng.randint(1, 4))
        time.sleep(rng.random() / 20)
        os.killpg(pid, signal.SIGKILL)
        assert commands.wait().status == -signal.SIGKILL, f'it had ended before kill {kill}'
        now = units_done(output)
        assert done.items() <= now.items()  # of what was recorded nothing is done again
        done = now
    commands.run('prepare_data', *command, f'--output={output}', '--num_workers=2').succeeded()
    assert contents(output) == whole


@pytest.mark.slow
def test_workers_open_whatever_tokenizer_one_process_does(commands, command, shared_data, tmp_path):
    given = [*command, f'--tokenizer={shared_data}/weights/stories260K/stories260K.gguf']
    for count in (1, 2):
        commands.run(
            'prepare_data', *given, f'--output={tmp_path}/{count}', f'--num_workers={count}'
        ).succeeded()
    assert contents(tmp_path / '2') == contents(tmp_path / '1')


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_one_more_try(commands, command, whole, tmp_path):
    output = tmp_path / 'out'
    pid = commands.start('prepare_data', *command, f'--output={output}', '--num_workers=2')
    await_tasks(output, 3)
    os.kill(children(pid)[0], signal.SIGKILL)
    finished = commands.wait().succeeded()
    assert 'a worker ended by signal 9 at' in finished.stderr and 'it is tried once more' in finished.stderr
    assert contents(output) == whole


KILLED_AT = """
import os, signal, sys
if sys.argv[0] == '-c':  # a worker
    from llama_jax.data import unit_tasks
    held_out = unit_tasks.is_held_out
    def is_held_out(text, fraction):
        if text == TEXT:
            os.kill(os.getpid(), signal.SIGKILL)
        return held_out(text, fraction)
    unit_tasks.is_held_out = is_held_out
"""


@pytest.mark.slow
def test_a_unit_that_kills_two_workers_is_named_and_the_next_run_goes_on(
    commands, command, whole, folder, tmp_path
):
    output = tmp_path / 'out'
    given = [*command, f'--output={output}', '--num_workers=2']
    text = json.loads((folder / 'part0.jsonl').read_text().splitlines()[200])['text']  # no other file has it
    (tmp_path / 'sitecustomize.py').write_text(KILLED_AT.replace('TEXT', repr(text)))
    line = commands.run(
        'prepare_data', *given, before=f'import sys; sys.path.insert(0, {str(tmp_path)!r})'
    ).error(status=1)
    named = re.search(r'two workers ended by signal 9 at unit (\d+), (\S+)\.jsonl record (\d+); where', line)
    assert (named[1], named[2][-5:]) == ('1', 'part0') and 100 < int(named[3]) <= 200  # where its unit begins
    assert not list(output.rglob('manifest.json'))
    commands.run('prepare_data', *given).succeeded()
    assert contents(output) == whole


@pytest.mark.slow
def test_of_three_machines_one_is_killed_and_takes_part_again(commands, command, whole, tmp_path):
    output = tmp_path / 'out'
    machines = [
        [*command, f'--output={output}', '--num_workers=1', '--num_shards=3', f'--shard_index={index}']
        for index in range(3)
    ]
    pids = commands.start_each('prepare_data', *machines)
    await_tasks(output, 6)
    os.kill(pids[1], signal.SIGKILL)
    assert not list(output.rglob('manifest.json'))  # the others wait
    again = run_python('prepare_data', *machines[1]).succeeded()
    assert 'going on with what was begun' in again.stderr
    first, killed, last = commands.wait_processes(pids)
    assert killed.status == -signal.SIGKILL
    assert first.succeeded().stdout == again.stdout == last.succeeded().stdout
    assert contents(output) == whole


FOUR = """
from configs.prepare_data import get_config as plain, source


def get_config(recipe=''):
    config = plain()
    config.validation_fraction = 0.05
    config.sources = {f's{number}': source(f'RAW/s{number}-*.jsonl') for number in range(4)}
    return config
"""


@pytest.mark.slow
def test_four_sources_have_the_same_bytes_however_they_are_made(
    commands, command, corpus, tmp_path, monkeypatch
):
    raw, documents = tmp_path / 'raw', corpus.read_text().split('\n<|endoftext|>\n')
    texts = {
        raw / f's{source}-{part}.jsonl': '\n'.join(
            json.dumps({'text': f'{source} {part} {place} {text}'})
            for place, text in enumerate(documents * (7 + source))
        )
        for source in range(4)
        for part in range(2)
    }

    def write(order):
        shutil.rmtree(raw, ignore_errors=True)
        raw.mkdir()
        for file in order:
            file.write_text(texts[file])

    write(texts)
    (tmp_path / 'four.py').write_text(FOUR.replace('RAW', str(raw)))
    given = [f'--config={tmp_path}/four.py', command[1], '--seq_len=64', '--unit_bytes=30000']
    for workers in (1, 2, 3):
        output = tmp_path / f'{workers} workers'
        commands.run('prepare_data', *given, f'--output={output}', f'--num_workers={workers}').succeeded()
    wanted = contents(tmp_path / '1 workers')
    assert wanted['report.png'].startswith(b'\x89PNG')
    trained = [name for name in wanted if re.fullmatch(r's\d/rows-\d+\.array_record', name)]
    print(f'{len(trained)} units')
    assert len(trained) >= 40 and {name[:2] for name in trained} == {'s0', 's1', 's2', 's3'}
    machines = [
        [
            *given,
            f'--output={tmp_path}/machines',
            '--num_workers=1',
            '--num_shards=3',
            f'--shard_index={index}',
        ]
        for index in range(3)
    ]
    for ended in commands.wait_processes(commands.start_each('prepare_data', *machines)):
        ended.succeeded()
    write(reversed(texts))
    monkeypatch.setenv('PYTHONHASHSEED', '7')
    monkeypatch.setenv('TZ', 'Asia/Tokyo')
    monkeypatch.setenv('JAX_PLATFORMS', 'none')  # no accelerator is asked for
    run_python('prepare_data', *given, f'--output={tmp_path}/elsewhere', '--num_workers=2').succeeded()
    for name in ('2 workers', '3 workers', 'machines', 'elsewhere'):
        assert contents(tmp_path / name) == wanted, name


@pytest.mark.slow
def test_llama_makes_the_folders_that_its_pretraining_names(commands, command, corpus, tmp_path):
    """Of files that lie as RedPajama-1T's do, in the current folder."""
    recipe, texts = prepare_data.get_config('llama'), corpus.read_text().split('\n<|endoftext|>\n')
    for section in recipe.sources.values():
        file = tmp_path / section.input.replace('*', 'part')
        file.parent.mkdir(parents=True)
        lines = '\n'.join(json.dumps({'text': text, 'meta': {}}) for text in texts).encode()
        file.write_bytes(zstandard.compress(lines) if file.suffix == '.zst' else lines)
    commands.run(
        'prepare_data', f'--config={REPOSITORY}/configs/prepare_data.py:llama', '--output=data', command[1],
        '--seq_len=64', '--config.validation_fraction=0.2', before=f'import os; os.chdir({str(tmp_path)!r})',
    ).succeeded()  # fmt: skip
    named = pretrain.get_config('llama_7b').data.train.split(',')
    assert {f'data/{path.name}' for path in (tmp_path / 'data').iterdir() if path.is_dir()} == set(named)
    for folder in named:
        held_out = PreparedRows(f'{tmp_path}/{folder}/validation').num_documents
        assert 0 < held_out < 50 and PreparedRows(f'{tmp_path}/{folder}').num_documents == 100 - held_out
    assert set(json.loads((tmp_path / 'data/report.json').read_text())['sources']) == set(recipe.sources)
