"""A policy that is trained is killed at any moment, or by several processes: the same figures and weights."""

import numpy as np
import pytest

from llama_jax.checkpoint.weights import open_params
from tests.command_line import saved_steps
from tests.killed import kill, kill_ten_times
from tests.multiprocess_test import WITHOUT_CACHE
from tests.policy_runs import arguments, begin, logged

MOMENTS = {  # and how many calls of each there are in an iteration or more
    'llama_jax.inference.generator:Generator.advance': 12,
    'experiments.policy.drawing:judge': 2,
    'experiments.policy.iterations:Iterations._with_advantages': 2,
    'experiments.policy.iterations:Iterations._minibatch': 4,
    'llama_jax.checkpoint.training:Checkpointer.save': 2,
}
TIMES = ('tokens_per', 'mfu', 'share_', 'data_wait')
SETTINGS = {
    'train__num_steps': 12, 'checkpoint__every': 3, 'algorithm__constants': 'epochs=2,beta_target=0.05',
    'rollout__slots': 4,
}  # fmt: skip


@pytest.fixture(scope='module')
def begun(commands, folder, corpus):
    return begin(commands, folder, corpus)


@pytest.fixture(scope='module')
def whole(commands, folder, begun):
    """A run that nothing has ended."""
    commands.run('ppo', *arguments(folder / 'whole', *begun, **SETTINGS)).succeeded()
    return folder / 'whole'


def assert_same(one, other):
    lines, others = logged(one), logged(other)
    assert [line['step'] for line in lines] == [line['step'] for line in others]
    for a, b in zip(lines, others, strict=True):
        for key in a.keys() | b.keys():
            assert key.startswith(TIMES) or a.get(key) == b.get(key), (a['step'], key)
    a, b = (open_params(run / f'checkpoints/{saved_steps(run)[-1]}') for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        of_all = tuple(slice(0, size) for size in a[name].shape)
        np.testing.assert_array_equal(a[name].read(of_all), b[name].read(of_all), err_msg=name)


@pytest.mark.slow
def test_killed_while_it_draws_and_while_it_learns_it_ends_the_same(commands, folder, begun, whole):
    run = ['ppo', *arguments(folder / 'killed', *begun, **SETTINGS)]
    # At the end of the second iteration. The checkpoint of step 6, within it, may be there; before it was begun that of
    # step 3, within the first, had been written.
    assert kill(commands, run, 'experiments.policy.iterations:Iterations._minibatch', 8)
    assert saved_steps(folder / 'killed') in ([3], [3, 6])
    assert kill(commands, run, 'llama_jax.inference.generator:Generator.advance', 3)
    commands.run(*run).succeeded()
    assert_same(whole, folder / 'killed')


@pytest.mark.long
def test_killed_at_ten_random_moments_it_ends_the_same(commands, folder, begun, whole):
    def run(workdir):
        return ['ppo', *arguments(workdir, *begun, **SETTINGS)]

    kill_ten_times(
        commands, folder / 'killed_often', run, MOMENTS, lambda workdir: assert_same(whole, workdir)
    )


@pytest.mark.slow
def test_two_processes_train_as_one(commands, folder, begun):
    """Of a device each, as one process of two."""
    settings = {'mesh__fsdp': 2, 'train__num_steps': 4}
    commands.run('ppo', *arguments(folder / 'one', *begun, **settings), num_devices=2).succeeded()
    run = arguments(folder / 'two', *begun, **settings)
    for ended in commands.run_processes('ppo', *run, num_processes=2, before=WITHOUT_CACHE, timeout=500):
        ended.succeeded()
    for a, b in zip(logged(folder / 'one'), logged(folder / 'two'), strict=True):
        for key in a.keys() - {'sampler_gap', 'sampler_gap_max'}:
            # Sums of two parts, in any order, by other kernels of the host's collectives.
            assert key.startswith(TIMES) or a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-6), key
