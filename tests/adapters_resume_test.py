"""Runs of adapters that are killed, or trained by two processes: the same losses as those of one left alone."""

import json
import random
import shutil
import signal

import numpy as np
import pytest

from tests.adapters_command_test import at
from tests.command_line import figures
from tests.multiprocess_test import WITHOUT_CACHE
from tests.sft_test import base, records, sizes  # noqa: F401 - fixtures
from tests.train.faults_test import AT_ONCE, BEFORE, COUNT, commands  # noqa: F401 - a fixture

NUM_STEPS = 9
# fp32 sums in another order, up to nine updates of AdamW after them
ON_ANOTHER_MESH = 1e-5


@pytest.fixture(scope='module')
def options(records, base):  # noqa: F811
    return sizes(
        '', 'WORKDIR', records, model__weights='nf4', lora__rank=4, lora__dropout=0.1, eval__sample_tokens=0,
        train__num_epochs=0.0, train__num_steps=NUM_STEPS, checkpoint__every=2,
    ) + base  # fmt: skip


def launch(commands, options, folder, workdirs, changes=(), more='', mesh=(), num_devices=1):  # noqa: F811
    """Runs the command in each of the workdirs at the same time, killed at so many changes of its files."""
    arms = [[f'{workdir}/', change, 0, 0, int(signal.SIGKILL), 0, more]
            for workdir, change in zip(workdirs, changes or [10**9] * len(workdirs), strict=True)]  # fmt: skip
    (folder / 'faults.json').write_text(json.dumps(arms))
    arguments = {number: at(options, workdir, *mesh) for number, workdir in enumerate(workdirs)}
    before = BEFORE.replace('FAULTS', str(folder / 'faults.json'))
    return commands.wait_processes(commands._start('sft', arguments, num_devices, before), timeout=1800)


@pytest.fixture(scope='module')
def whole(commands, folder, options):  # noqa: F811
    """The workdir of a run left alone."""
    count = COUNT.replace('COUNT', f'{folder}/changes')
    launch(commands, options, folder, [folder / 'whole'], more=count)[0].succeeded()
    return folder / 'whole'


def losses(workdir):
    return np.array([loss for _, loss, _ in figures(workdir)])


@pytest.mark.parametrize(
    ('number', 'part'),
    [
        pytest.param(3, 0, marks=pytest.mark.slow),
        *(pytest.param(20, part, marks=pytest.mark.long) for part in range(20 // AT_ONCE)),
    ],
)
def test_killed_at_any_moment_a_run_goes_on(
    commands, folder, options, whole, tmp_path, number, part  # noqa: F811
):  # fmt: skip
    """On the same mesh with the same bits, on another with the same losses; so many moments, a part at a time."""
    rng, total = random.Random(number), int((folder / 'changes').read_text())
    moments = [1 + int((n + rng.random()) / number * 0.97 * total) for n in range(number)]
    moments = moments[AT_ONCE * part :][:AT_ONCE]
    workdirs = [tmp_path / f'run{moment}' for moment in moments]
    killed = launch(commands, options, tmp_path, workdirs, moments)
    # There are more or fewer changes by the time that each takes (659 to 725 were seen): a run may end before its own.
    assert {ended.status for ended in killed} <= {0, -signal.SIGKILL}
    assert sum(ended.status != 0 for ended in killed) > len(moments) / 2
    elsewhere = [workdir.with_name(f'{workdir.name}_mesh') for workdir in workdirs]
    for workdir, copy in zip(workdirs, elsewhere, strict=True):
        if workdir.exists():
            shutil.copytree(workdir, copy)
    mesh = ('--config.mesh.fsdp=2', '--config.mesh.tensor=2')
    for ended in [
        *launch(commands, options, tmp_path, workdirs),
        *launch(commands, options, tmp_path, elsewhere, mesh=mesh, num_devices=4),
    ]:
        ended.succeeded()
    for moment, workdir, copy in zip(moments, workdirs, elsewhere, strict=True):
        assert figures(workdir) == figures(whole), moment
        assert (workdir / 'report.json').read_bytes() == (whole / 'report.json').read_bytes(), moment
        np.testing.assert_allclose(losses(copy), losses(whole), rtol=ON_ANOTHER_MESH, err_msg=str(moment))
        print(f'killed at change {moment} of {total}: goes on', flush=True)


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on(commands, options, whole, tmp_path):  # noqa: F811
    def run(workdir):
        for ended in commands.run_processes(
            'sft', *at(options, workdir), num_processes=2, before=WITHOUT_CACHE
        ):
            ended.succeeded()
        return figures(workdir)

    found = run(tmp_path / 'two')
    np.testing.assert_allclose(losses(tmp_path / 'two'), losses(whole), rtol=ON_ANOTHER_MESH)
    shutil.copytree(tmp_path / 'two', tmp_path / 'again')
    for step in (NUM_STEPS, NUM_STEPS - 1):
        shutil.rmtree(tmp_path / f'again/checkpoints/{step}')
    (tmp_path / 'again/report.json').unlink()
    assert run(tmp_path / 'again') == found
