"""What a GPU or TPU is asked in some minutes, by worth: the other suites at full size, and the tests that need one.

Each check is a command in a process of its own, which alone holds the device, with a share of the time. One that
fails, hangs or runs out of memory is told in one line, its outcome, and the next goes on.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from llama_jax.errors import InputError, error_line
from llama_jax.models.config import LlamaConfig
from llama_jax.models.presets import PRESETS

_MINUTES = flags.DEFINE_float('minutes', 9, 'in which all must end', lower_bound=0.1)

# By default JAX takes three quarters of a GPU's memory, and leaves the rest to nobody.
_PREALLOCATE = 'XLA_PYTHON_CLIENT_PREALLOCATE'
_FRACTION = 'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'  # JAX takes one of them, not both
ENVIRONMENT = {} if any(map(os.environ.get, _FRACTION)) else {_FRACTION[0]: '0.92'}
_PROBE = """
import json, jax
from llama_jax import runtime
runtime.check_devices()
first, memory = jax.devices()[0], jax.devices()[0].memory_stats() or {}
device = dict(platform=first.platform, device=first.device_kind, num_devices=jax.device_count())
print(json.dumps(device | {'device_memory_bytes': memory.get('bytes_limit', 0)}))
"""
# Of a weight with its gradient, the optimiser's state and what its update holds; the rest is for activations. XLA's
# compiler for TPUs plans 9.8 to 10.2 for Adafactor: 4, 4, and copies of the largest array of all layers.
STATE_BYTES = {'adamw': 16, 'adafactor': 11}
# By part of the suite `finetune`: of all weights by Adafactor, as above, beside a base in bfloat16 (2) and one in nf4
# (0.52); of a base alone, with activations, which are most of it.
FINETUNE_BYTES = {'qlora': STATE_BYTES['adafactor'] + 3, 'dpo_lora': 6, 'gradients': 6}
STATE_SHARE = 0.7
# What is kept of the JSON of each suite.
FIGURES = {
    'train': r'layers|batch_size|seq_len|.*_second.*|mfu_.*|peak_memory_bytes|ratio_to_best_peer|kernels?(_.*)?',
    'attention': r'.*_(auto|ms|bytes)',
    'decode': r'copy_bandwidth|batch_.*',
    'finetune': r'layers|batch_size|packed|(qlora|dpo|gradients)_.*',
    'rl': r'phases_.*',
    'serve': r'.*_(seconds|per_second)|.*_ratio_to_.*|first_ms_.*',
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One command.

    Attributes:
      name: before each of its figures.
      command: arguments of Python; `--json=FILE` is added where figures are read.
      seconds: after which it is killed.
      figures: pattern of what is kept of its JSON; '': it writes none, and its last line is its `summary`.
      environment: variables beside those of this process.
    """

    name: str
    command: Sequence[str]
    seconds: float
    figures: str = ''
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def main() -> Iterator[dict[str, Any]]:
    """All figures so far, at first those of the device and then after each check; status 1 where one went wrong.

    Raises:
      InputError: there is no accelerator.
    """
    deadline = time.monotonic() + 60 * _MINUTES.value
    machine = find_accelerator()
    figures: dict[str, Any] = {}
    for figures in run_checks(make_checks(machine), deadline):
        yield machine | figures
    if failed := [name for name, value in figures.items() if str(value).startswith('failed: ')]:
        sys.exit(f'error: {len(failed)} checks failed: {", ".join(failed)} tells why')


def find_accelerator() -> dict[str, Any]:
    """Platform, kind, number and memory of the devices, as a process of its own sees them: it lets go of them again."""
    environment = os.environ | ENVIRONMENT
    try:
        command = [sys.executable, '-c', _PROBE]
        probe = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise InputError('--suite=accelerator: JAX has found no device within 120 seconds') from error
    if probe.returncode:
        raise InputError(f'--suite=accelerator finds no GPU or TPU: {telling_line(probe.stderr)}')
    machine = json.loads(probe.stdout.splitlines()[-1])
    if machine['platform'] == 'cpu':
        raise InputError('--suite=accelerator needs a GPU or TPU, and JAX finds a CPU alone')
    return machine


def make_checks(machine: Mapping[str, Any]) -> list[Check]:
    """What this machine is asked, by worth."""
    is_gpu, rows = machine['platform'] == 'gpu', machine['num_devices']
    platform = os.environ.get('JAX_PLATFORMS') or ('cuda' if is_gpu else machine['platform'])
    folder = Path(__file__).parents[2] / 'tests'
    # Only the files that have such tests: others import what takes longer than these tests do.
    files = [
        str(file) for file in sorted(folder.rglob('*_test.py')) if 'mark.accelerator' in file.read_text()
    ]
    tests = ['-m', 'pytest', '-q', '-n', '0', '-m', 'accelerator']
    # Its commands are processes beside that of pytest, and may be too slow to hold up the other tests.
    apart = str(folder / 'policy_optimum_test.py')
    of_tests = ENVIRONMENT | {'JAX_PLATFORMS': platform}

    def suite(name: str, seconds: float, suite: str, options: str) -> Check:
        # A peer, or a server, needs some of the memory.
        alone = 'false' if '--peer' in options or suite == 'serve' else 'true'
        environment = ENVIRONMENT | {_PREALLOCATE: alone}
        command = ['-m', 'experiments.benchmark', f'--suite={suite}', *options.split()]
        return Check(name, command, seconds, FIGURES[suite], environment)

    def train(name: str, seconds: float, options: str = '', model: str = 'llama2_7b') -> Check:
        bytes_per_weight = STATE_BYTES['adafactor' if 'adafactor' in options else 'adamw']
        layers = fitting_layers(PRESETS[model], rows * machine['device_memory_bytes'], bytes_per_weight)
        sizes = f'--model={model} --layers={layers} --batch_size={rows} --dtype=bfloat16 --rounds=3 --nopeer --profile'
        return suite(name, seconds, 'train', f'{sizes} {options.replace("LAYERS", str(layers))}')

    def finetune(name: str, seconds: float, part: str, options: str) -> Check:
        # On one device, however many there are.
        layers = fitting_layers(PRESETS['llama2_7b'], machine['device_memory_bytes'], FINETUNE_BYTES[part])
        sizes = f'--finetune_model=llama2_7b --finetune_layers={layers} --finetune_packed=2048 --finetune_rounds=3'
        computing = '--finetune_dtype=bfloat16 --finetune_remat=projections'
        return suite(name, seconds, 'finetune', f'--finetune_parts={part} {sizes} {computing} {options}')

    decode = '--decode_model=llama2_7b --decode_prompt=896 --decode_tokens=128 --decode_profile'
    # Half of the layers, as the weights are written, read, and then stand beside the sampler's copy and 64 answers.
    grpo = '--rl_parts=phases --rl_model=llama2_7b --rl_layers=16 --rl_answer=512 --rl_rounds=2'
    # The server's weights and rows, and the generator's, share the memory.
    serve = '--serve_model=llama2_7b --serve_clients=1,64 --serve_prompt=64 --serve_tokens=128 --noserve_peer'
    shapes = '--noattention_check --attention_shapes'  # the tests say whether it is right
    checks = [
        Check('tests', [*tests, *(file for file in files if file != apart)], 150, environment=of_tests),
        train('train_7b', 120, f'--remat=projections --batch_size={2 * rows}'),
        # Next what no GPU has been asked yet.
        finetune('finetune_7b', 150, 'qlora', '--finetune_batch_size=4 --finetune_profile'),
        suite('grpo_7b', 240, 'rl', grpo),
        finetune('finetune_7b_dpo', 90, 'dpo_lora', '--finetune_batch_size=4 --finetune_profile'),
        finetune('finetune_7b_gradients', 90, 'gradients', '--finetune_batch_size=1'),
        suite('serve_7b', 330, 'serve', serve),
        Check('optimum', [*tests, '-s', apart], 150, environment=of_tests | {_PREALLOCATE: 'false'}),
        suite('attention', 90, 'attention', f'{shapes}=2,4096,32,32,128;1,8192,32,8,128'),
        suite('decode_7b', 90, 'decode', decode),
        suite('decode_7b_int8', 60, 'decode', f'{decode} --decode_batches=1 --decode_weights=int8'),
        suite(
            'prompt_7b', 60, 'decode', f'{decode} --decode_batches=1 --decode_prompt=2048 --decode_tokens=8'
        ),
        train('train_8b', 120, '--remat=projections', model='llama3_8b'),
        train('train_7b_attention', 90, f'--batch_size={4 * rows}'),
        # Few layers, as three contenders share the memory; on one device, as Hugging Face's use no more.
        train('train_7b_peer', 150, '--layers=4 --peer'),
        train('train_7b_adafactor', 90, f'--optimizer=adafactor --remat=projections --batch_size={2 * rows}'),
        train('train_7b_unrolled', 150, f'--unroll=LAYERS --remat=projections --batch_size={2 * rows}'),
        train('train_7b_full', 90, f'--remat=full --batch_size={4 * rows}'),
        suite('attention_long', 90, 'attention', f'{shapes}=1,32768,32,8,128'),
    ]
    # What has processes beside it, which no TPU is shared by, or is compared with what one device does.
    of_one_gpu = {'train_7b_peer', 'grpo_7b', 'serve_7b', 'optimum'}
    return [check for check in checks if is_gpu and rows == 1 or check.name not in of_one_gpu]


def fitting_layers(config: LlamaConfig, num_bytes: int, bytes_per_weight: int) -> int:
    """As many of the model's layers as can be trained in so much memory, at least one and at most all."""
    tables = config.num_params - config.num_block_params
    weights = STATE_SHARE * num_bytes / bytes_per_weight - tables
    return int(min(max(weights * config.num_layers // config.num_block_params, 1), config.num_layers))


def run_checks(checks: Sequence[Check], deadline: float) -> Iterator[dict[str, Any]]:
    """All figures so far, at first none and then after each check, which is 'ok', 'failed: ...' or 'left out: ...'.

    Args:
      checks: in the order in which they run.
      deadline: of `time.monotonic`, when all must have ended.
    """
    figures: dict[str, Any] = {}
    yield figures
    for check in checks:
        variables = [f'{name}={value}' for name, value in check.environment.items()]
        print(f'\n{check.name}: {shlex.join([*variables, "python", *check.command])}', flush=True)
        start = time.monotonic()
        seconds = min(check.seconds, deadline - start)
        outcome, found = run_check(check, seconds) if seconds > 0 else ('left out: the time was up', {})
        found |= {'outcome': outcome, 'seconds': round(time.monotonic() - start, 1)}
        figures |= {f'{check.name}_{name}': value for name, value in found.items()}
        print(f'{check.name}: {outcome}', flush=True)
        yield figures


def run_check(check: Check, seconds: float) -> tuple[str, dict[str, Any]]:
    """Its outcome, and what is kept of its figures; prints what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / 'figures.json', Path(folder) / 'log'
        command = [sys.executable, *check.command, *([f'--json={file}'] if check.figures else [])]
        with log.open('wb') as output:
            # In a group of its own, all of which is killed: what hangs may have started others.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | check.environment, start_new_session=True,
            )  # fmt: skip
            status = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(seconds)
            finally:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(30)  # until it lets go of the device
        text = log.read_text(errors='replace')
        print(text, end='', flush=True)
        line = telling_line(text)
        if status is None:
            how = 'failed: killed' if seconds >= check.seconds else 'left out: the time was up'
            return f'{how} after {seconds:.0f} seconds: {line}', {}
        if status:
            how = f'status {status}' if status > 0 else signal.Signals(-status).name
            return f'failed: {how}: {line}', {}
        if not check.figures:
            return 'ok', {'summary': line}
        try:
            found = json.loads(file.read_text()).items()
        except (OSError, ValueError) as error:
            return f'failed: it left no figures: {error_line(error)}', {}
    return 'ok', {key: value for key, value in found if re.fullmatch(check.figures, key)}


def telling_line(text: str) -> str:
    """The line of an output that says most of why a program ended: its last error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ['it printed nothing']
    errors = [line for line in lines if re.match(r'error: |[\w.]+(Error|Exception|Interrupt): ', line)]
    return (errors or lines)[-1][:400]
