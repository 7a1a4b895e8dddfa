"""Measures what users wait for, beside what they would otherwise use, in one run.

    python -m experiments.benchmark --suite=train [--json=FILE]

Each suite is a file of its own, `benchmark/SUITE.py`, which says what it measures and has its own flags;
--helpfull lists them.
"""

import importlib
import importlib.util
import json
import os
import platform
from typing import Any

import jax
from absl import flags
from etils import epath

from experiments import launch
from experiments.benchmark import (
    accelerator,
    attention,
    convert,
    data,
    decode,
    finetune,
    generator,
    rl,
    serve,
    train,
)
from experiments.benchmark import eval as evaluation
from llama_jax import runtime, storage
from llama_jax.errors import InputError
from llama_jax.json_file import check_replaceable

SUITES = {
    'train': train.main,
    'attention': attention.main,
    'convert': convert.main,
    'eval': evaluation.main,
    'decode': decode.main,
    'generator': generator.main,
    'finetune': finetune.main,
    'data': data.main,
    'rl': rl.main,
    'serve': serve.main,
    'accelerator': accelerator.main,
}

_SUITE = flags.DEFINE_enum('suite', 'train', list(SUITES), 'what to measure')
_JSON = launch.define_path('json', '', 'file to write the figures to, as one flat object')


def main() -> None:
    """Runs the suite; --json keeps its figures, of a suite of many parts after each."""
    # Refuses the flags of other suites, which this one would ignore.
    others = {suite.__module__: name for name, suite in SUITES.items() if name != _SUITE.value}
    for name in flags.FLAGS:
        module = flags.FLAGS.find_module_defining_flag(name)
        if flags.FLAGS[name].present and module in others:
            raise InputError(
                f'--{name} is of --suite={others[module]}; --suite={_SUITE.value} does not use it'
            )
    if SUITES[_SUITE.value] is accelerator.main:  # the devices are for the processes that it starts
        jax.config.update('jax_platforms', 'cpu')
    launch.find_devices()
    if _JSON.value:
        storage.check_place(_JSON.value, folder=False)
        with launch.flags_named('--json'):
            check_replaceable(epath.Path(_JSON.value), ('suite', 'platform'))
    runtime.enable_compilation_cache('off')  # compile time is one of the figures
    found = SUITES[_SUITE.value]()
    for figures in [found] if isinstance(found, dict) else found:
        if _JSON.value:
            figures = describe_machine() | {'suite': _SUITE.value} | figures
            storage.write_atomically(epath.Path(_JSON.value), json.dumps(figures, indent=2) + '\n')


def describe_machine() -> dict[str, Any]:
    """What the figures were taken on."""
    device = jax.devices()[0]
    versions = {
        f'{name}_version': importlib.import_module(name).__version__
        for name in ('jax', 'flax', 'torch', 'transformers')
        if importlib.util.find_spec(name)
    }
    return {
        'platform': device.platform, 'device': device.device_kind, 'num_devices': jax.device_count(),
        'cpu_cores': os.cpu_count(), 'python_version': platform.python_version(), 'machine': platform.machine(),
        **versions,
    }  # fmt: skip


if __name__ == '__main__':
    launch.run(main, find=False)
