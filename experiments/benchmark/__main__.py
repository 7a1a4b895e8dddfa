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

from experiments import launch
from experiments.benchmark import attention, convert, train
from experiments.benchmark import eval as evaluation
from llama_jax import runtime

SUITES = {
    'train': train.run,
    'attention': attention.run,
    'convert': convert.run,
    'eval': evaluation.run,
}

_SUITE = flags.DEFINE_enum('suite', 'train', list(SUITES), 'what to measure')
_JSON = flags.DEFINE_string('json', '', 'file to write the figures to, as one flat object')


def main() -> None:
    """Runs the suite; --json keeps its figures."""
    runtime.enable_compilation_cache('off')  # compile time is one of the figures
    figures = describe_machine() | {'suite': _SUITE.value} | SUITES[_SUITE.value]()
    if _JSON.value:
        with open(_JSON.value, 'w', encoding='utf-8') as file:
            json.dump(figures, file, indent=2)
            file.write('\n')


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
    launch.run(main)
