"""Runs that are killed, stopped, damaged and moved, and end with the losses of a run that was left alone."""

import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from llama_jax.data.datasets import pretrain_dataset, train_tokenizer
from llama_jax.data.lm_batch import lm_batch
from llama_jax.data.loader import batches
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.metrics import read_metrics
from tests import toy
from tests.command_line import CommandLine, figures, saved_steps, tiny_run, wait_for

NUM_STEPS = 16


@pytest.fixture(scope='module')
def commands(folder):
    # A cache of their own: a process killed while it writes there can spoil the one of all other tests.
    cache = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'), 'JAX_COMPILATION_CACHE_MAX_SIZE': '-1'}
    return CommandLine(folder, num_devices=8, **cache)


def arguments(workdir, corpus, **overrides):
    settings = {
        'data__seq_len': 32, 'data__validation_fraction': 0.0, 'mesh__fsdp': 4, 'mesh__tensor': 2,
        'checkpoint__every': 1, 'train__num_steps': NUM_STEPS,
    }  # fmt: skip
    return tiny_run(workdir, corpus, **settings | overrides)


@pytest.fixture(scope='module')
def uninterrupted(folder, commands, corpus):
    """The workdir of a run that was left alone, with a checkpoint of every step."""
    workdir = folder / 'uninterrupted'
    commands.run('pretrain', *arguments(workdir, corpus, checkpoint__keep=NUM_STEPS)).succeeded()
    assert [step for step, *_ in figures(workdir)] == list(range(1, NUM_STEPS + 1)) == saved_steps(workdir)
    return workdir


@pytest.fixture
def stopped_at(uninterrupted, tmp_path):
    """step -> a workdir like that of a run that was killed after it."""

    def copy(step):
        workdir = tmp_path / 'run'
        shutil.copytree(uninterrupted, workdir)
        for later in range(step + 1, NUM_STEPS + 1):
            shutil.rmtree(workdir / f'checkpoints/{later}')
        return workdir

    return copy


def kill_and_resume(commands, workdir, command, num_kills, rng, before=''):
    """Runs `command` until it has been killed often enough, then to its end; returns how many kills cut off a save."""
    checkpoints = workdir / 'checkpoints'

    def unfinished():
        return (
            {path.name for path in checkpoints.glob('*.orbax-checkpoint-tmp')}
            if checkpoints.exists()
            else set()
        )

    def newest():
        return max(saved_steps(workdir), default=0) if checkpoints.exists() else 0

    kills = saves = 0
    while kills < num_kills or saves < num_kills / 2:
        old = unfinished()  # of the kill before; the new process clears it away
        pid = commands.start('pretrain', *command, before=before)
        # Every other kill comes at any moment, from the imports to some way into training, the rest in a save.
        aims_at_save = saves <= kills / 2
        wanted, seen = rng.randint(1, 2), set()
        end = time.monotonic() + (120 if aims_at_save else rng.uniform(0, 8))
        first = newest()
        # Not too far into training either, or a fast machine would be done before it was killed often enough.
        while time.monotonic() < end and newest() < first + 6 and not (aims_at_save and len(seen) >= wanted):
            seen |= unfinished() - old
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03) if aims_at_save else 0)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pytest.fail(f'the run ended after {kills} kills: {commands.wait()}')
        assert commands.wait().status == -signal.SIGKILL
        kills += 1
        saves += bool(unfinished() - old)
        assert kills < 3 * num_kills, f'only {saves} of {kills} kills cut off a save'
    commands.run('pretrain', *command).succeeded()
    assert not unfinished()
    return saves


# Saves that take long enough to be met by who looks for them on a busy machine.
LONG_SAVES = """
import time
from llama_jax.checkpoint import training


def long(*arguments, original=training.record_files):
    time.sleep(0.5)
    original(*arguments)


training.record_files = long
"""


def test_a_run_killed_in_a_save_ends_as_if_left_alone(commands, corpus, uninterrupted, tmp_path):
    command = arguments(tmp_path / 'run', corpus)
    assert kill_and_resume(commands, tmp_path / 'run', command, 1, random.Random(0), LONG_SAVES) == 1
    assert figures(tmp_path / 'run') == figures(uninterrupted)
    assert saved_steps(tmp_path / 'run') == [NUM_STEPS - 2, NUM_STEPS - 1, NUM_STEPS]


@pytest.mark.slow
def test_twenty_kills(commands, corpus, tmp_path):
    settings = {'train__num_steps': 150, 'checkpoint__every': 2}
    commands.run('pretrain', *arguments(tmp_path / 'whole', corpus, **settings)).succeeded()
    command = arguments(tmp_path / 'killed', corpus, **settings)
    saves = kill_and_resume(commands, tmp_path / 'killed', command, 20, random.Random(1))
    print(f'{saves} kills cut off a save')
    assert saves >= 10
    assert figures(tmp_path / 'killed') == figures(tmp_path / 'whole')


def test_sigterm_saves_and_ends_well(commands, corpus, uninterrupted, stopped_at):
    workdir = stopped_at(2)
    command = arguments(workdir, corpus, checkpoint__every=0)  # so that nothing else saves
    pid = commands.start('pretrain', *command)
    wait_for(lambda: 3 <= figures(workdir)[-1][0] < NUM_STEPS)  # cut back to step 2, then logging on
    os.kill(pid, signal.SIGTERM)
    finished = commands.wait().succeeded()
    step = saved_steps(workdir)[-1]
    assert 3 <= step < NUM_STEPS and f'stopped at step {step} and saved' in finished.stderr
    assert figures(workdir) == figures(uninterrupted)[:step]
    assert f'resuming at step {step} of' in commands.run('pretrain', *command).succeeded().stderr
    assert figures(workdir) == figures(uninterrupted)


# A validation that takes minutes, and says when it has begun.
LONG_VALIDATION = """
import pathlib, time
from llama_jax.train import validation


def long(*arguments, original=validation.evaluate_rows, **options):
    pathlib.Path('FOLDER/validating').touch()
    time.sleep(120)
    return original(*arguments, **options)


validation.evaluate_rows = long
"""


@pytest.mark.slow
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGKILL])  # of the others see loop_test.py
def test_what_follows_the_last_step_loses_nothing(commands, corpus, tmp_path, signum):
    settings = {'data__validation_fraction': 0.1, 'train__num_steps': 3, 'checkpoint__every': 0}
    commands.run('pretrain', *arguments(tmp_path / 'whole', corpus, **settings)).succeeded()
    command, workdir = arguments(tmp_path / 'run', corpus, **settings), tmp_path / 'run'
    pid = commands.start('pretrain', *command, before=LONG_VALIDATION.replace('FOLDER', str(tmp_path)))
    deadline = time.monotonic() + 120
    while not (tmp_path / 'validating').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    start = time.monotonic()
    os.kill(pid, signum)
    finished = commands.wait()
    assert time.monotonic() - start < 60 and saved_steps(workdir) == [3]
    if signum != signal.SIGKILL:
        assert 'stopped at step 3 and saved' in finished.succeeded().stderr
    assert not (workdir / 'report.json').exists()
    commands.run('pretrain', *command).succeeded()  # makes up for it
    for name in ('validation_loss', 'validation_bits_per_byte', 'loss', 'grad_norm'):
        before, after = (
            [line.get(name) for line in read_metrics(run / 'metrics.jsonl')]
            for run in (tmp_path / 'whole', workdir)
        )
        assert before == after and len(after) == 3 and after[-1]
    reports = [(run / 'report.json').read_text() for run in (tmp_path / 'whole', workdir)]
    assert reports[0] == reports[1]


def test_a_step_damaged_after_its_commit_is_passed_over(commands, corpus, uninterrupted, stopped_at):
    workdir = stopped_at(10)
    largest = max(
        (workdir / 'checkpoints/10').rglob('*'), key=lambda path: path.is_file() and path.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    finished = commands.run('pretrain', *arguments(workdir, corpus)).succeeded()
    assert 'checkpoint of step 10 is damaged' in finished.stderr and largest.name in finished.stderr
    assert 'resuming at step 9 of' in finished.stderr
    assert figures(workdir) == figures(uninterrupted)
    assert (workdir / 'checkpoints/10.damaged').is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('num_devices', 'mesh'),
    [
        (1, {'mesh__fsdp': 1, 'mesh__tensor': 1}),
        (2, {'mesh__fsdp': 1, 'mesh__tensor': 1, 'mesh__context': 2}),
    ],
)
def test_another_mesh_goes_on_with_the_same_losses(
    commands, corpus, uninterrupted, stopped_at, num_devices, mesh
):
    workdir = stopped_at(8)
    commands.run('pretrain', *arguments(workdir, corpus, **mesh), num_devices=num_devices).succeeded()
    before, after = figures(uninterrupted), figures(workdir)
    assert after[:8] == before[:8] and len(after) == NUM_STEPS
    # Sums are taken in another order, which fp32 rounds differently.
    np.testing.assert_allclose(
        [loss for _, loss, _ in after[8:]], [loss for _, loss, _ in before[8:]], rtol=1e-6
    )


def test_every_mesh_reads_the_same_rows(corpus, tmp_path):
    tokenizer = train_tokenizer([str(corpus)], 320, tmp_path / 'tokenizer.model')
    rows = pretrain_dataset(
        [str(corpus)], tokenizer, 32, separator='<|endoftext|>', validation_fraction=0.0, seed=5
    ).train
    consumed = 3 * 8
    for count, sizes in (
        (8, {'fsdp': 4, 'tensor': 2}),
        (8, {'data': 2, 'context': 4}),
        (2, {'fsdp': 2}),
        (1, {}),
    ):
        partitioner = Partitioner(make_mesh(sizes, jax.devices()[:count]))
        read = batches(rows, toy.abstract_batch(partitioner, 8, 32), rows_consumed=consumed)
        for start in (consumed, consumed + 8):
            wanted = [rows[i] for i in range(start, start + 8)]
            wanted = lm_batch(
                *(np.stack([row[name] for row in wanted]) for name in ('tokens', 'segment_ids'))
            )
            jax.tree.map(np.testing.assert_array_equal, next(read), wanted)
