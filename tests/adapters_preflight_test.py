"""What training beside a frozen base takes at full size, as compiled for TPUs: the table of docs/finetuning.md."""

import json

import pytest

from llama_jax.models.presets import PRESETS

GIB = 2**30
BESIDE = ('--config.lora.rank=8', '--config.lora.targets=all')


@pytest.fixture
def compiled(commands, tmp_path):
    def compiled(model, topology, rows, *options, remat='full'):
        file = tmp_path / 'report.json'
        commands.run(
            'preflight', f'--config=configs/sft.py:{model}', f'--topology={topology}', f'--config.model.remat={remat}',
            f'--config.train.batch_size={rows}', f'--json={file}', '--max_tries=0', *options,
        ).succeeded()  # fmt: skip
        found = json.loads(file.read_text())['train']
        hbm = {
            name: f'{size / GIB:.2f}' for name, size in found['hbm'].items() if isinstance(size, int | float)
        }
        print(f'{model} on {topology} {" ".join(options)}: {hbm} GiB, {found["flops"]}', flush=True)
        assert found['fits'] and not found['involuntary_rematerializations']
        return found

    return compiled


@pytest.mark.long
@pytest.mark.parametrize(('model', 'topology'), [('llama2_70b', 'v5p:2x2x1'), ('llama2_7b', 'v5e:2x2')])
def test_a_base_in_nf4_fits_four_chips(compiled, model, topology):
    found = compiled(model, topology, 4, *BESIDE, '--config.model.weights=nf4')
    given = 4 * found['memory_analysis']['argument_size_in_bytes'] / PRESETS[model].num_params
    print(f'{given:.3f} bytes a weight', flush=True)
    assert model != 'llama2_70b' or given <= 0.57


@pytest.mark.long
@pytest.mark.parametrize(('remat', 'most'), [('none', 0.75), ('full', 0.82)])
def test_beside_a_base_a_step_has_fewer_products(compiled, remat, most):
    settings = 'llama2_7b', 'v5p:2x2x2', 8
    beside = compiled(*settings, *BESIDE, '--config.model.weights=bfloat16', remat=remat)
    whole = compiled(*settings, remat=remat)
    assert beside['flops']['per_device'] <= most * whole['flops']['per_device']
