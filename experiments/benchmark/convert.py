"""Conversion beside a plain copy, and loading: seconds and peak memory, on a checkpoint of a model's full size.

The checkpoint is made here, of random bfloat16 values, in Meta's format. Each conversion is the command that users run,
in a process of its own; the copy (`cp` and `sync` of the same files) is taken just before it in the same run. The first
model is loaded too, in float32, on one device and on eight emulated ones.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from experiments import launch
from experiments.benchmark.peak import run_measured
from experiments.run.config_file import split_list
from experiments.run.settings import find_preset
from llama_jax.convert import meta
from llama_jax.convert.mapping import Source, layers_of, weights_of
from llama_jax.convert.tensors import ALL, BFLOAT16
from llama_jax.data.sources import read_documents
from llama_jax.tokenizer.training import train_sentencepiece

_MODELS = flags.DEFINE_string(
    'convert_models', 'llama3_2_1b,llama2_7b', "presets; the last one's memory is set against the first one's"
)
_SCRATCH = launch.define_path(
    'scratch', '', "folder for the checkpoints, four times the largest; '' for the system's"
)

# name: (input, output format, further flags); an input is an earlier output. What is no longer needed is removed.
CONVERSIONS = {
    'meta_to_orbax': ('meta', 'orbax', []),
    'orbax_to_meta': ('orbax', 'meta', []),
    'meta_to_huggingface': ('meta', 'huggingface', []),
    'huggingface_to_gguf_q8_0': ('huggingface', 'gguf', ['--dtype=q8_0']),
}


@dataclasses.dataclass(frozen=True)
class _Noise:
    """A matrix of random values that takes no memory: windows on one block of them."""

    shape: tuple[int, ...]
    values: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        width = self.shape[1] if len(self.shape) == 2 else 1
        begin = start * 7919 % 65536
        block = self.values[begin : begin + (stop - start) * width]
        return block.reshape(-1, width)[:, columns] if len(self.shape) == 2 else block


def make_checkpoint(model: str, folder: Path) -> None:
    """Writes a checkpoint of a preset's full size, in bfloat16, as Meta would, with a small tokenizer."""
    config = find_preset(model)
    values = np.random.default_rng(0).normal(0, 0.02, 1 << 25).astype(BFLOAT16)
    values = np.concatenate([values, values[: 1 << 23]])
    tensors = {
        weight.path: [_Noise(weight.matrix_shape(config), values) for _ in layers_of(weight, config)]
        for weight in weights_of(config)
    }
    folder.mkdir(parents=True)
    train_sentencepiece(read_documents('python_stdlib'), 512, folder / 'tokenizer.model')
    meta.write(Source(config, tensors, model), epath.Path(folder))


def main() -> dict[str, Any]:
    """Seconds, ratio to the copy, and peak memory of each conversion of each model; prints a line each."""
    models = split_list(_MODELS.value)
    figures: dict[str, Any] = {}
    for model in models:
        with tempfile.TemporaryDirectory(dir=_SCRATCH.value or None) as temporary:
            folder = Path(temporary)
            make_checkpoint(model, folder / 'meta')
            if model == models[0]:  # a larger one would take the memory of all its weights
                for devices in (1, 8):
                    figures |= _measure_load(model, folder / 'meta', devices)
            for name, (source, to, options) in CONVERSIONS.items():
                figures |= _measure(f'{model}_{name}', folder / source, folder / f'{name}', to, options)
                kept = folder / to
                if to != source and not kept.exists():
                    (folder / name).rename(kept)
                else:
                    shutil.rmtree(folder / name)
    first, last = models[0], models[-1]
    for name in CONVERSIONS:
        key = f'{name}_peak_memory_ratio_{last}_to_{first}'
        figures[key] = round(
            figures[f'{last}_{name}_peak_rss_mb'] / figures[f'{first}_{name}_peak_rss_mb'], 2
        )
    return figures


def _measure(name: str, source: Path, target: Path, to: str, options: list[str]) -> dict[str, Any]:
    copy = target.with_name('copy')
    copy_seconds, _ = run_measured(['sh', '-c', f'cp -r {source} {copy} && sync'])
    shutil.rmtree(copy)
    os.sync()
    output = target / 'model.gguf' if to == 'gguf' else target
    command = [
        sys.executable, '-m', 'experiments.convert', f'--input={source}', f'--output={output}', f'--to={to}', *options
    ]  # fmt: skip
    start = time.perf_counter()
    _, peak_rss = run_measured(command)
    os.sync()
    seconds = time.perf_counter() - start
    num_bytes = sum(file.stat().st_size for file in source.rglob('*') if file.is_file())
    print(
        f'{name:45} {num_bytes / 1e9:6.2f} GB   {seconds:7.1f} s   {seconds / copy_seconds:5.2f}x of cp + sync '
        f'({copy_seconds:.1f} s)   peak memory {peak_rss / 1e6:6.0f} MB',
        flush=True,
    )
    return {
        f'{name}_input_gb': round(num_bytes / 1e9, 3),
        f'{name}_seconds': round(seconds, 2),
        f'{name}_copy_seconds': round(copy_seconds, 2),
        f'{name}_times_copy': round(seconds / copy_seconds, 2),
        f'{name}_peak_rss_mb': round(peak_rss / 1e6),
    }


# The clock starts when JAX has its devices.
_LOAD = """
import sys, time, jax
from llama_jax import make_mesh, pretrained
mesh = make_mesh({'fsdp': jax.device_count()})
start = time.perf_counter()
jax.block_until_ready(pretrained.load(sys.argv[1], mesh=mesh)[1])
sys.stderr.write(str(time.perf_counter() - start))
"""


def _measure_load(model: str, folder: Path, devices: int) -> dict[str, Any]:
    environment = {
        **os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'
    }  # fmt: skip
    loaded = subprocess.run(
        [sys.executable, '-c', _LOAD, folder], stderr=subprocess.PIPE, text=True, env=environment, check=True
    )
    seconds = float(loaded.stderr.split()[-1])
    name = f'{model}_load_{devices}_device{"s" * (devices > 1)}'
    print(f'{name:45} {seconds:17.1f} s', flush=True)
    return {f'{name}_seconds': round(seconds, 2)}
