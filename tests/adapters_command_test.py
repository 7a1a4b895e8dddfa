"""Adapters as a user trains them: a run beside a base in nf4, what its workdir is good for, what is refused."""

import json
import shutil

import numpy as np
import pytest

from llama_jax import pretrained
from tests.command_line import figures, saved_steps
from tests.sft_test import base, records, sizes  # noqa: F401 - fixtures

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def options(records, base):  # noqa: F811
    return sizes(
        '', 'WORKDIR', records, model__weights='nf4', lora__rank=4, lora__dropout=0.1, train__num_epochs=0.0,
        train__num_steps=6, checkpoint__every=3,
    ) + base  # fmt: skip


def at(options, workdir, *more):
    return [item.replace('WORKDIR', str(workdir)) for item in options] + list(more)


@pytest.fixture(scope='module')
def run(commands, folder, options):
    commands.run('sft', *at(options, folder / 'lora')).succeeded()
    return folder / 'lora'


def test_a_run_goes_on_exactly_and_on_another_mesh_nearly(commands, folder, options, run):
    whole = figures(run)
    for name, mesh, devices in (
        ('same', [], 1),
        ('mesh', ['--config.mesh.fsdp=2', '--config.mesh.tensor=2'], 4),
    ):
        shutil.copytree(run, folder / name)
        shutil.rmtree(folder / name / 'checkpoints/6')
        commands.run('sft', *at(options, folder / name, *mesh), num_devices=devices).succeeded()
        found = figures(folder / name)
        if name == 'same':
            assert found == whole
        # fp32 sums in another order, three updates of AdamW after them
        np.testing.assert_allclose([line[1] for line in found], [line[1] for line in whole], rtol=1e-5)


@pytest.mark.parametrize(
    ('changed', 'line'),
    [
        ('--config.lora.rank=8', r'--config.lora.rank was 4 and is 8'),
        ('--config.lora.targets=q', r"--config.lora.targets was 'all' and is 'q'"),
        ('--config.model.weights=int8', r"--config.model.weights was 'nf4' and is 'int8'"),
        ('--override=lora.rank', r"--override=lora.rank: the weights or the optimiser's state are made for"),
    ],
)
def test_another_adapter_is_refused(commands, options, run, changed, line):
    assert line in commands.run('sft', *at(options, run, changed)).error()
    assert saved_steps(run)[-1] == 6


def test_there_must_be_a_base(commands, folder, options):
    without = [item for item in options if not item.startswith('--checkpoint')]
    line = commands.run('sft', *at(without, folder / 'none')).error()
    assert '--config.lora.rank=4 trains adapters beside the weights of --checkpoint; give it' in line
    assert not (folder / 'none').exists()


def test_a_workdir_is_a_checkpoint_wherever_one_is_asked_for(commands, folder, run):
    described = json.loads((run / 'model.json').read_text())['adapters']
    assert described['weights'] == 'nf4' and described['base'].endswith('stories260K.pt')
    prompt = ['--prompt=Once', '--max_new_tokens=8', '--temperature=0', '--dtype=float32']
    own = commands.run('generate', f'--checkpoint={run}', *prompt).succeeded().stdout
    commands.run('convert', f'--input={run}', f'--output={folder / "merged"}', '--to=huggingface').succeeded()
    merged = commands.run('generate', f'--checkpoint={folder / "merged"}', *prompt).succeeded().stdout
    assert own == merged and own.strip()
    opened = [pretrained.load(path)[1] for path in (run, folder / 'merged')]
    for ours, theirs in zip(*([*w['blocks']['mlp'].values()] for w in opened), strict=True):
        np.testing.assert_array_equal(ours, theirs)
