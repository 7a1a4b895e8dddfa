"""Measures what users wait for, beside what they would otherwise use, in one run.

    python -m experiments.benchmark --suite=train [--json=FILE]

Each suite is a file of its own, `benchmark/SUITE.py`, which says what it measures and has its own flags.
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
from experiments.benchmark import accelerator, attention, convert, decode, train
from experiments.benchmark import eval as evaluation
from llama_jax import runtime, storage
from llama_jax.types import InputError

SUITES = {
    'train': train.run,
    'attention': attention.run,
    'convert': convert.run,
    'eval': evaluation.run,
    'decode': decode.run,
    'accelerator': accelerator.run,
}

_SUITE = flags.DEFINE_enum('suite', 'train', list(SUITES), 'what to measure')
_JSON = launch.define_path('json', '', 'file to write the figures to, as one flat object')


def prepare() -> None:
    """Leaves the devices to the processes that a suite starts, where it measures in those alone."""
    check_flags(_SUITE.value)
    if SUITES[_SUITE.value] is accelerator.run:
        jax.config.update('jax_platforms', 'cpu')


def main() -> None:
    """Runs the suite; --json keeps its figures, of a suite of many parts after each."""
    if _JSON.value:
        storage.check_place(_JSON.value, folder=False)
    runtime.enable_compilation_cache('off')  # compile time is one of the figures
    found = SUITES[_SUITE.value]()
    for figures in [found] if isinstance(found, dict) else found:
        if _JSON.value:
            figures = describe_machine() | {'suite': _SUITE.value} | figures
            storage.write_atomically(epath.Path(_JSON.value), json.dumps(figures, indent=2) + '\n')


def check_flags(suite: str) -> None:
    """Refuses the flags of other suites, which this one would ignore."""
    others = {run.__module__: name for name, run in SUITES.items() if name != suite}
    for name in flags.FLAGS:
        module = flags.FLAGS.find_module_defining_flag(name)
        if flags.FLAGS[name].present and module in others:
            raise InputError(f'--{name} is of --suite={others[module]}; --suite={suite} does not use it')


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
    launch.run(main, prepare=prepare)
