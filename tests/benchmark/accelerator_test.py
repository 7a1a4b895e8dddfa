"""`benchmark --suite=accelerator`: checks that end well, fail, hang or say nothing; the time limit; what is asked."""

import dataclasses
import json
import time

import pytest

from experiments.benchmark import accelerator
from experiments.benchmark.accelerator import FINETUNE_BYTES, STATE_BYTES, Check, make_checks, run_checks
from llama_jax.errors import InputError
from llama_jax.models.presets import PRESETS
from llama_jax.models.remat import REMAT_POLICIES
from tests.docs_test import flags_of

H100 = {
    'platform': 'gpu',
    'device': 'NVIDIA H100 80GB HBM3',
    'num_devices': 1,
    'device_memory_bytes': 78 * 10**9,
}
TPU = {'platform': 'tpu', 'device': 'TPU v5p', 'num_devices': 4, 'device_memory_bytes': 95 * 2**30}

WRITES = """
import json, os, sys
file = sys.argv[-1].removeprefix('--json=')
json.dump({'fast_ms': 2.5, 'other': 1, 'device': os.environ['KIND']}, open(file, 'w'))
"""
# Of a process and of one that it has started.
HANGS = """
import os, sys, time
print('compiling', flush=True)
os.fork()
open(sys.argv[1], 'a').write(f'{os.getpid()}\\n')
time.sleep(60)
"""


def fake(name, code, *arguments, seconds=30.0, figures='.*_ms|device', **environment):
    return Check(name, ['-S', '-c', code, *arguments], seconds, figures, environment)


def test_whatever_a_check_does_the_next_goes_on(tmp_path, capfd):
    pids = tmp_path / 'pids'
    checks = [
        fake('good', WRITES, KIND='a'),
        fake('full', "print('busy'); raise MemoryError('RESOURCE_EXHAUSTED: 9 GiB')\n"),
        fake('refused', "import sys; print('error: no such kernel', file=sys.stderr); sys.exit(2)"),
        fake('hangs', HANGS, str(pids), seconds=2.4),
        fake('killed', 'import os; os.kill(os.getpid(), 9)'),
        fake('silent', 'pass'),
        fake('half', "import sys; open(sys.argv[-1].removeprefix('--json='), 'w').write('{')"),
        fake('tests', "print('3 passed in 2s')", figures=''),
        fake('again', WRITES, KIND='b'),
    ]
    *steps, figures = run_checks(checks, time.monotonic() + 60)
    assert len(steps) == len(checks)  # what there is can be kept after each
    outcomes = {check.name: figures[f'{check.name}_outcome'] for check in checks}
    assert outcomes | {'half': 'failed'} == {
        'good': 'ok',
        'full': 'failed: status 1: MemoryError: RESOURCE_EXHAUSTED: 9 GiB',
        'refused': 'failed: status 2: error: no such kernel',
        'hangs': 'failed: killed after 2 seconds: compiling',
        'killed': 'failed: SIGKILL: it printed nothing',
        'silent': outcomes['silent'],
        'half': 'failed',
        'tests': 'ok',
        'again': 'ok',
    }
    assert outcomes['silent'].startswith('failed: it left no figures: ')
    assert outcomes['half'].startswith('failed: it left no figures: ')
    assert figures['good_fast_ms'] == 2.5 and figures['good_device'] == 'a' and figures['again_device'] == 'b'
    assert 'good_other' not in figures and figures['tests_summary'] == '3 passed in 2s'
    printed = capfd.readouterr().out
    assert 'compiling\nhangs: failed' in printed and "\n\ntests: python -S -c 'print(" in printed
    hung = [int(pid) for pid in pids.read_text().split()]
    assert len(hung) == 2 and not any(map(is_running, hung))


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_the_time_limit_is_kept(tmp_path):
    start = time.monotonic()
    checks = [fake('slow', HANGS, str(tmp_path / 'pids')), fake('next', WRITES, KIND='a')]
    *_, figures = run_checks(checks, start + 2.4)
    assert time.monotonic() - start < 30
    assert figures['slow_outcome'] == 'left out: the time was up after 2 seconds: compiling'
    assert figures['next_outcome'] == 'left out: the time was up' and figures['next_seconds'] == 0


def test_a_cpu_is_no_accelerator():
    with pytest.raises(InputError, match='needs a GPU or TPU, and JAX finds a CPU alone'):
        accelerator.find_accelerator()


@pytest.mark.parametrize('machine', [H100, TPU], ids=['gpu', 'tpu'])
def test_every_check_is_a_command_that_there_is(machine):
    checks = make_checks(machine)
    assert len({check.name for check in checks}) == len(checks) >= 10
    for check in checks:
        words = [word[2:].partition('=') for word in check.command if word.startswith('--')]
        flags = {name: value for name, _, value in words}
        assert {name.removeprefix('no') for name in flags} <= flags_of('benchmark')
        assert flags.get('remat', 'full') in REMAT_POLICIES and flags.get('model', 'llama2_7b') in PRESETS
        if flags.get('suite') == 'train':
            model = PRESETS[flags['model']]
            model = dataclasses.replace(model, num_layers=int(flags['layers']))
            state = model.num_params * STATE_BYTES[flags.get('optimizer', 'adamw')]
            memory = machine['device_memory_bytes'] * machine['num_devices']
            all_layers = model.num_layers == PRESETS[flags['model']].num_layers
            assert state < 0.7 * memory and (state > 0.6 * memory or all_layers or 'peer' in flags)
            assert int(flags['batch_size']) % machine['num_devices'] == 0


def test_fine_tuning_at_full_widths_fits_one_device():
    """All that stands at once in bytes: weights, gradients and update; bases; what remat keeps of a token."""
    checks = {check.name: check.command for check in make_checks(H100)}
    for name, part, by_weight in (
        ('finetune_7b', 'qlora', STATE_BYTES['adafactor'] + 2 + 0.52),
        ('finetune_7b_dpo', 'dpo_lora', 2),
        ('finetune_7b_gradients', 'gradients', 0.52 + 2),
    ):
        given = dict(word[2:].split('=') for word in checks[name] if '=' in word)
        config = PRESETS[given['finetune_model']]
        layers, rows = int(given['finetune_layers']), int(given['finetune_batch_size'])
        config = dataclasses.replace(config, num_layers=layers)
        assert given['finetune_remat'] == 'projections' and given['finetune_parts'] == part
        of_heads = (config.num_heads + config.num_kv_heads) * config.head_dim
        kept = 3 * config.embed_dim + 2 * of_heads + 2 * config.mlp_dim  # as models.remat says
        # The gradients are taken in float32 as well.
        itemsize = 4 if part == 'gradients' else 2
        activations = itemsize * kept * layers * rows * int(given['finetune_packed'])
        assert by_weight * config.num_params + activations < 0.92 * H100['device_memory_bytes']
        assert layers == accelerator.fitting_layers(
            PRESETS['llama2_7b'], H100['device_memory_bytes'], FINETUNE_BYTES[part]
        )
    assert layers == 32 and '--finetune_layers=17' in checks['finetune_7b']


def test_what_shares_a_gpu_fits():
    """Weights and the cache's rows, in bf16; what is beside them (activations, programs) has the rest."""
    commands = {check.name: check for check in make_checks(H100)}
    names = 'grpo_7b', 'optimum', 'serve_7b'
    assert not {*names} & {check.name for check in make_checks(TPU)}
    shared = [commands[name].environment['XLA_PYTHON_CLIENT_PREALLOCATE'] for name in names]
    assert shared == ['true', 'false', 'false']
    assert commands['optimum'].command[-1] not in commands['tests'].command
    (layers,) = (int(word[12:]) for word in commands['grpo_7b'].command if word.startswith('--rl_layers='))
    model = dataclasses.replace(PRESETS['llama2_7b'], num_layers=layers)
    # The base with the sampler's copy, and 64 answers; the server with the generator, and 64 rows of each.
    for config, tokens, sharers in ((model, 1024, 1), (PRESETS['llama2_7b'], 256, 2)):
        cached = 64 * tokens * config.num_layers * 2 * config.num_kv_heads * config.head_dim
        assert 2 * (2 * config.num_params + sharers * cached) < 0.7 * H100['device_memory_bytes']


@pytest.mark.slow
def test_its_pieces_run(tmp_path):
    """One check of each suite with tiny shapes, as they are started and read on an accelerator."""
    tiny = ['--model=tiny', '--layers=2', '--batch_size=8', '--seq_len=32', '--steps=1', '--rounds=1']
    more = {
        'train_7b_adafactor': tiny,
        'attention_long': ['--attention_shapes=1,64,4,2,16'],
        'finetune_7b_dpo': [
            '--finetune_model=tiny',
            '--finetune_layers=1',
            '--finetune_packed=64',
            '--finetune_rounds=1',
        ],
        'decode_7b': [
            '--decode_model=tiny',
            '--decode_batches=3',
            '--decode_tokens=32',
            '--decode_prompt=16',
        ],
    }
    checks = [
        dataclasses.replace(check, command=[*check.command, *more[check.name]])
        for check in make_checks(H100)
        if check.name in more
    ]
    *_, figures = run_checks(checks, time.monotonic() + 600)
    assert {figures[f'{check.name}_outcome'] for check in checks} == {'ok'}
    assert figures['train_7b_adafactor_layers'] == 2 and figures['train_7b_adafactor_mfu_causal'] > 0
    assert figures['train_7b_adafactor_llama_jax_tokens_per_second'] > 0
    assert figures['train_7b_adafactor_peak_memory_bytes'] > 0
    assert figures['finetune_7b_dpo_layers'] == 1 and figures['finetune_7b_dpo_dpo_lora_per_second'] > 0
    assert figures['finetune_7b_dpo_dpo_lora_peak_memory_bytes'] > 0
    assert figures['attention_long_1x64x4x2x16_chunked_both_ms'] > 0
    step, rate = (figures[f'decode_7b_batch_3_{name}'] for name in ('step_ms', 'tokens_per_second'))
    assert rate == pytest.approx(3 / (1e-3 * step)) and figures['decode_7b_copy_bandwidth'] > 1e8
    assert not any('version' in name for name in figures)  # the machine is described once


# A device that there is not; the second check fails, and the command still keeps the first one's figures.
PRETEND = """
import jax
import experiments.benchmark.accelerator as suite
jax.config.update('jax_platforms', 'cuda')  # which the command itself must not take from its checks
suite.find_accelerator = lambda: {'platform': 'gpu', 'num_devices': 1, 'device_memory_bytes': 10**9}
suite.make_checks = lambda machine: [
    suite.Check('tests', ['-S', '-c', 'print("3 passed")'], 9),
    suite.Check('bad', ['-S', '-c', 'raise SystemExit(3)'], 9),
]
"""


@pytest.mark.slow
def test_the_command(commands, tmp_path):
    file = tmp_path / 'figures.json'
    arguments = ['--suite=accelerator', '--minutes=1', f'--json={file}']
    assert 'needs a GPU or TPU' in commands.run('benchmark', *arguments).error()
    assert '--rounds is of --suite=train' in commands.run('benchmark', *arguments, '--rounds=1').error()
    assert not file.exists()
    finished = commands.run('benchmark', *arguments, before=PRETEND)
    assert finished.status == 1 and finished.stderr.splitlines()[-1].startswith('error: 1 checks failed')
    figures = json.loads(file.read_text())
    assert figures['suite'] == 'accelerator' and figures['platform'] == 'gpu' and figures['jax_version']
    assert figures['tests_summary'] == '3 passed' and figures['bad_outcome'].startswith('failed: status 3')
