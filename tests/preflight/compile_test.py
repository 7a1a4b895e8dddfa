"""Ahead-of-time compilation for TPUs; what needs libtpu runs in a process of its own, as a user's command does."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from llama_jax.preflight import compile as ahead
from llama_jax.preflight.compile import parse_exhausted
from tests.command_line import REPOSITORY, run_python

_skip = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install 'llama_jax[tpu]'"
)


def needs_libtpu(test):
    """Compiling for TPUs takes minutes on two cores, and a download of 684 MB: with the slow tests."""
    return pytest.mark.slow(_skip(test))


GIB = 2**30


@pytest.mark.parametrize(
    ('message', 'found'),
    [
        (
            'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (68.50G) '
            'exceeds available HBM (15.75G).',
            (int(68.5 * GIB), int(15.75 * GIB)),
        ),
        (
            'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used '
            '23.65G of 15.75G hbm. Exceeded hbm capacity by 7.90G.',
            (int(23.65 * GIB), int(15.75 * GIB)),
        ),
        ('RESOURCE_EXHAUSTED: something else', (1, 0)),
        ('INVALID_ARGUMENT: no such option', (0, 0)),
    ],
)
def test_what_xla_says_of_too_large_a_program(message, found):
    assert parse_exhausted(message) == found


# The beginning of what XLA reported of Llama 2 7B on v5e:4x4 with 32 rows, and what `memory_analysis()` said of it.
REPORT = """Memory Space: default (color=0)
Total bytes: 12026876928 (11.20GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    2.00GiB( 19%);    2.00GiB;     20135936;                5; 5xbf16[32,2,4096,4096]

Memory Space: vmem (color=1)
Total bytes: 113524736 (108.27MiB)
"""
STATISTICS = {
    'argument_size_in_bytes': 5056955904, 'output_size_in_bytes': 5056810496, 'alias_size_in_bytes': 5056808448,
    'temp_size_in_bytes': 10044534272, 'peak_memory_in_bytes': 11670189568, 'generated_code_size_in_bytes': 45651456,
    'host_temp_size_in_bytes': 0, 'host_argument_size_in_bytes': 0, 'host_output_size_in_bytes': 0,
    'host_alias_size_in_bytes': 0,
}  # fmt: skip


class FakeProgram:
    """A jitted function, what it is lowered to, and its executable."""

    def __init__(self, report: str, refusal: str = ''):
        self.report, self.refusal = report, refusal

    def lower(self, *arguments):
        return self

    def compile(self, compiler_options):
        (pathlib.Path(compiler_options['xla_dump_to']) / 'jit_step.memory-usage-report.txt').write_text(
            self.report
        )
        if self.refusal:
            raise jax.errors.JaxRuntimeError(self.refusal)
        return self

    def memory_analysis(self):
        return types.SimpleNamespace(**STATISTICS)


@pytest.mark.parametrize(('available', 'fits'), [(int(15.75 * GIB), True), (12_026_876_928, False)])
def test_memory_is_what_xla_reserves(monkeypatch, available, fits):
    """Not arguments and `temp_size_in_bytes`, 14.06 GiB; and with the code, which lies there too."""
    monkeypatch.setattr(ahead, 'available_bytes', lambda device: available)
    compiled = ahead.compile_ahead(FakeProgram(REPORT), jnp.zeros(1))
    assert compiled.memory is not None
    assert compiled.needed == compiled.memory.total == 12_026_876_928 + 45_651_456
    assert (compiled.fits, compiled.available) == (fits, available)
    assert compiled.memory.statistics['temp_size_in_bytes'] == 10_044_534_272


def test_what_a_refused_program_needs_is_told_to_the_byte():
    refusal = (
        'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.77G) '
        'exceeds available HBM (15.75G).'
    )
    report = REPORT.replace('12026876928 (11.20GiB)', '18002416640 (16.77GiB)')
    compiled = ahead.compile_ahead(FakeProgram(report, refusal), jnp.zeros(1))
    assert (compiled.fits, compiled.needed, compiled.available) == (False, 18_002_416_640, int(15.75 * GIB))


def test_without_a_report_the_worst_moment_stands_for_it(monkeypatch, caplog):
    monkeypatch.setattr(ahead, 'available_bytes', lambda device: 16 * GIB)
    compiled = ahead.compile_ahead(FakeProgram(''), jnp.zeros(1))
    assert compiled.needed == 11_670_189_568 + 45_651_456
    assert 'XLA reported no assignment of memory' in caplog.text


def test_standard_error_of_other_code_is_taken_and_given_back(capfd):
    lines = []
    with ahead.captured_stderr(lines):
        os.write(2, b'taken\n')
    os.write(2, b'given back\n')
    assert lines == ['taken']
    assert capfd.readouterr().err == 'given back\n'


def command(*arguments):
    return run_python(
        'preflight', '--config=configs/pretrain.py:tiny', '--config.model.dtype=bfloat16', *arguments
    )


WITHOUT_LIBTPU = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == 'libtpu' else find(name, *rest)
sys.argv = ['preflight', '--config=configs/pretrain.py:tiny', '--topology=v5e:2x2']
runpy.run_module('experiments.preflight', run_name='__main__', alter_sys=True)
"""


def test_without_libtpu_one_line_says_what_to_install():
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_LIBTPU], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "error: preflight compiles with libtpu, which is not installed: pip install 'llama_jax[tpu]'\n"
    )


@needs_libtpu
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--topology=v5e'], "topology 'v5e': write CHIP:AxB"),
        (['--topology=v5e:3x3'], 'topology v5e:3x3: libtpu refuses it: INVALID_ARGUMENT'),
        (
            ['--topology=2xv5e:2x2'],
            'the devices are in 2 slices; dcn_data must be 2 (set by --config.mesh.*)',
        ),
        (['--topology=v5e:2x4', '--config.mesh.tensor=3'], 'impossible mesh'),
        (['--topology=v5e:2x2', '--notrain'], 'are about a decode step: add --decode_batch=ROWS'),
        (
            ['--topology=v5e:2x2', '--xla_options=xla_no_such_option=1'],
            'refuses the XLA options xla_no_such_option',
        ),
    ],
)
def test_bad_requests_end_with_one_line(arguments, message):
    assert message in command(*arguments).error()


@needs_libtpu
def test_the_report_of_a_small_run(tmp_path):
    """Two slices: what fits, in which parts, what crosses from slice to slice, and the same on standard output."""
    file = tmp_path / 'report.json'
    finished = command(
        '--topology=2xv5e:2x2', '--config.mesh.dcn_data=2', f'--json={file}', '--decode_batch=8',
        '--config.model.attention=chunked', '--config.train.batch_size=16',
    ).succeeded()  # fmt: skip
    report = json.loads(file.read_text())
    assert (report['chips'], report['devices'], report['mesh']['dcn_data']) == (8, 8, 2)
    for step in (report['train'], report['decode']):
        assert step['fits'] and step['involuntary_rematerializations'] == []
        assert step['flops']['opaque_kernels'] == {}
        assert step['roofline']['seconds'] == max(
            step['roofline'][name] for name in ('compute', 'hbm', 'ici', 'dcn')
        )
        assert 0 < step['roofline']['mfu_causal'] <= step['roofline']['mfu_full'] < 1
    train = report['train']
    # Chunked attention visits the keys that a query's document reaches, which the data tells, and not the program.
    assert train['flops']['unknown_loops'] > 0 and report['decode']['flops']['unknown_loops'] == 0
    assert 'counted once: loops of unknown length' in finished.stdout
    parts = ('parameters', 'optimizer', 'gradients', 'activations', 'temporaries', 'batch', 'code')
    assert sum(train['hbm'][name] for name in parts) == train['hbm']['total']
    # Of 4 layers, one of a device's rows: keys and values of 256 tokens, 4 heads of 48, in bf16.
    assert report['decode']['hbm']['kv_cache'] == 4 * 2 * 256 * 4 * 48 * 2
    assert report['decode']['hbm']['batch'] < report['decode']['hbm']['kv_cache'], (
        'no more than padding of layouts'
    )
    assert 0.1 < report['process_memory'] < 16, 'GiB'
    assert train['hbm']['optimizer'] == pytest.approx(2 * train['hbm']['parameters'], rel=1e-3)
    # Recomputation comes on top of what the model needs.
    assert 1 < train['flops']['per_device'] / train['flops']['model_causal'] < 1.5
    across = sum(kind['dcn_bytes'] for kind in train['collectives'].values())
    gradients = train['hbm']['parameters']
    assert gradients <= across < 2 * gradients, (
        'between slices go gradients, each device its part of them, and little else'
    )
    assert 'train step of 16 x 256 tokens' in finished.stdout and 'decode step of 8 rows' in finished.stdout


@needs_libtpu
def test_a_run_that_is_too_large_is_told_and_given_what_fits(tmp_path):
    """2,048 rows a device with everything saved are some 20 GB; the flags that are named then really fit."""
    arguments = ['--topology=v5e:2x2', '--config.train.batch_size=8192', '--config.model.attention=chunked']
    file = tmp_path / 'report.json'
    finished = command(*arguments, '--config.model.remat=none', f'--json={file}').succeeded()
    report = json.loads(file.read_text())
    assert not report['train']['fits'] and 'DOES NOT FIT' in finished.stdout
    fitting = report['search']['fits_with']
    available = report['train']['hbm']['available']
    assert report['train']['hbm']['total'] > available >= report['search']['total'] > 0
    figures = f'{report["search"]["total"] / GIB:.2f} of {available / GIB:.2f} GiB'
    assert fitting and f'it fits, {figures}, with {" ".join(fitting)}' in finished.stdout
    again = ['--config.model.remat=none', *fitting, f'--json={file}', '--max_tries=0']
    again = [
        flag
        for flag in again
        if flag.split('=')[0] not in {other.split('=')[0] for other in again[again.index(flag) + 1 :]}
    ]
    command(*arguments, *again).succeeded()
    assert json.loads(file.read_text())['train']['fits']


@needs_libtpu
def test_decode_on_a_mesh_that_splits_rows(tmp_path):
    """A row that grows is not split: `fsdp` takes the devices, and rows that they do not divide end at once."""
    split = ['--topology=v5e:2x2', '--config.mesh.context=2', '--config.model.attention=chunked']
    file = tmp_path / 'report.json'
    finished = command(
        *split, '--config.train.batch_size=4', '--decode_batch=4', f'--json={file}'
    ).succeeded()
    report = json.loads(file.read_text())
    assert (report['mesh']['fsdp'], report['mesh']['context']) == (2, 2)
    assert (report['decode']['mesh']['fsdp'], report['decode']['mesh']['context']) == (4, 1)
    assert 'decode step of 4 rows on a mesh of fsdp=4, context=1: fits' in finished.stdout
    assert '--decode_batch=2 does not divide over 4 devices' in command(*split, '--decode_batch=2').error()


@needs_libtpu
def test_a_decode_step_alone(tmp_path):
    """In int8, without the train step: no faster than what it reads, and what it says is what it holds."""
    file = tmp_path / 'report.json'
    flags = ['--notrain', '--decode_batch=8', '--decode_weights=int8', f'--json={file}']
    finished = command('--topology=v5e:2x2', '--config.mesh.tensor=4', *flags).succeeded()
    report = json.loads(file.read_text())
    assert 'train' not in report and 'train step' not in finished.stdout
    decode = report['decode']
    assert (decode['rows'], decode['weights'], decode['fits']) == (8, 'int8', True)
    assert 0 < decode['reading']['seconds'] <= 1.01 * decode['roofline']['hbm']
    assert decode['reading']['bytes'] <= decode['hbm']['parameters'] + decode['hbm']['kv_cache']
    assert 'decode step of 8 rows, int8 weights: fits' in finished.stdout


# The tiny model, so deep that its state is too large for a slice: a loop compiles as fast however often it runs.
DEEP = """
import dataclasses, runpy, sys
from llama_jax.models.presets import PRESETS
PRESETS['tiny'] = dataclasses.replace(PRESETS['tiny'], num_layers=12_000)
sys.argv[0] = 'preflight'
runpy.run_module('experiments.preflight', run_name='__main__', alter_sys=True)
"""


@needs_libtpu
def test_a_state_too_large_for_a_slice_is_split_over_slices(tmp_path):
    """85 GB of parameters, optimiser state and gradients on 4 devices; the flag that is named then really fits."""
    file = tmp_path / 'report.json'

    def run(*more: str):
        arguments = [
            '--config=configs/pretrain.py:tiny', '--topology=2xv5e:2x2', '--config.mesh.dcn_data=2',
            '--config.train.batch_size=8', '--config.model.attention=chunked', '--config.model.remat=full',
            '--config.model.dtype=bfloat16', f'--json={file}', *more,
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, '-c', DEEP, *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text()), done.stdout

    report, printed = run()
    assert not report['train']['fits'] and 'DOES NOT FIT' in printed
    fitting = report['search']['fits_with']
    assert fitting == ['--config.mesh.axis_rules=embed=dcn_data+fsdp+context']
    assert f' GiB, with {fitting[0]}\n' in printed
    again, _ = run(*fitting, '--max_tries=0')
    assert again['train']['fits'] and again['train']['hbm']['total'] == report['search']['total']


# A look-up that XLA can only do by replicating the result first; the same that tests/train/mesh_test.py compiles.
KNOWN_BAD = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from llama_jax.preflight import compile as ahead
from llama_jax.preflight.topology import Topology
ahead.isolate_process()
mesh = Mesh(np.array(ahead.topology_devices(Topology.parse('v5e:2x4'))).reshape(2, 2, 2), ('data', 'fsdp', 'tensor'))
table, ids, out = (
    NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, 'fsdp'), (None, 'data'), ('fsdp', 'tensor', None))
)
look_up = jax.jit(lambda table, ids: jax.lax.with_sharding_constraint(jnp.take(table, ids, axis=0), out))
arguments = (
    jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=table), jax.ShapeDtypeStruct((16, 16), jnp.int32, sharding=ids)
)
print(len(ahead.compile_ahead(look_up, *arguments).rematerializations))
"""


@needs_libtpu
def test_a_known_bad_program_is_noticed():
    done = subprocess.run(
        [sys.executable, '-c', KNOWN_BAD], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, (
        'XLA no longer warns of a program that needs it: "none" in a report proves nothing'
    )


# Layers in a loop, AdamW's state donated: with so many rows `memory_analysis()` counts more than there is, and it fits.
GROWING = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from llama_jax.preflight import compile as ahead
from llama_jax.preflight.topology import Topology
ahead.isolate_process()
mesh = Mesh(np.array(ahead.topology_devices(Topology.parse('v5litepod-4'))), ('x',))
split, rows = NamedSharding(mesh, P(None, 'x')), NamedSharding(mesh, P('x'))

def step(state, x):
    weights, mean, square = state
    def loss(weights):
        layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w.astype(jnp.bfloat16)), None))
        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2)
    value, g = jax.value_and_grad(loss)(weights)
    mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g * g
    return (weights - mean / (jnp.sqrt(square) + 1e-8), mean, square), value

weights = jax.ShapeDtypeStruct((8, 4096, 4096), jnp.float32, sharding=split)
for number in (9, 11):
    x = jax.ShapeDtypeStruct((number * 65536, 4096), jnp.bfloat16, sharding=rows)
    found = ahead.compile_ahead(jax.jit(step, donate_argnums=0), (weights,) * 3, x)
    statistics = found.memory.statistics if found.memory else {}
    sizes = statistics.get('argument_size_in_bytes', 0) + statistics.get('temp_size_in_bytes', 0)
    print(int(found.fits), found.needed, found.available, sizes)
"""


@needs_libtpu
def test_the_figure_is_the_one_that_xla_decides_by():
    """The same program with more and more rows: what is printed crosses what there is where XLA refuses it."""
    done = subprocess.run(
        [sys.executable, '-c', GROWING], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (fits, needed, available, sizes), (also_fits, more, _, _) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    assert available == int(15.75 * GIB)
    assert fits and needed <= available < sizes, 'sizes of memory_analysis() would have said no'
    assert not also_fits and more > available
