"""Settings of the XLA compiler by name, checked against the compiler at hand before anything is run.

Given as environment variables (XLA_FLAGS, LIBTPU_INIT_ARGS), one unknown flag ends the process, and flags come and go
with every jaxlib. Given to one compilation, as here, an unknown one is an error that can be told in a line.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.types import InputError

Value = bool | int | float | str

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings that go together; the two that `benchmark --suite=accelerator` measures. None is on by default.

    Attributes:
      kinds: parts of `device_kind`, any of which must be there.
      options: the settings.
      purpose: what they are meant to do, and who publishes them.
    """

    kinds: tuple[str, ...]
    options: Mapping[str, Value]
    purpose: str


_TPU, _GPU = ('TPU',), ('NVIDIA', 'H100', 'H200', 'A100', 'B200')
_COLLECTIVES = ('all_gather', 'reduce_scatter', 'all_reduce')

PRESETS: dict[str, Preset] = {
    'tpu_overlap': Preset(
        _TPU,
        {
            'xla_tpu_enable_async_collective_fusion': True,
            'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
            'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
            'xla_tpu_overlap_compute_collective_tc': True,
            'xla_enable_async_all_gather': True,
            'xla_tpu_enable_data_parallel_all_reduce_opt': True,
            'xla_tpu_data_parallel_opt_different_sized_ops': True,
        },
        'weights gathered while the layer before computes (MaxText, Llama 2 on v5e and v5p)',
    ),
    'gpu_overlap': Preset(
        _GPU,
        {'xla_gpu_enable_latency_hiding_scheduler': True}
        | {f'xla_gpu_enable_pipelined_{name}': True for name in _COLLECTIVES}  # gone with jaxlib 0.12
        # At least one layer's weights or gradients (436 MB of bf16 for 7B), so that they travel together.
        | {f'xla_gpu_{name}_combine_threshold_bytes': 2**29 for name in _COLLECTIVES},
        'collectives hidden behind computation (JAX-Toolbox, MaxText on H100)',
    ),
}


def parse(text: str, mesh: Mesh) -> dict[str, Value]:
    """The settings of a list such as 'tpu_overlap,xla_tpu_scoped_vmem_limit_kib=65536', proved to be known.

    Args:
      text: names of `PRESETS` and NAME=VALUE, later ones outweighing earlier; '' for none.
      mesh: the devices that will be compiled for.

    Returns:
      The settings; of a preset's those alone that this compiler knows, with a warning for each of the others.

    Raises:
      InputError: an unknown preset, one for other devices, or NAME=VALUE that this compiler does not know or take.
    """
    options: dict[str, Value] = {}
    given: set[str] = set()
    kind = mesh.devices.flat[0].device_kind
    for item in filter(None, (part.strip() for part in text.split(','))):
        name, equals, value = item.partition('=')
        if equals:
            options[name.lstrip('-')] = _value(value)
            given.add(name.lstrip('-'))
            continue
        if name not in PRESETS:
            raise InputError(
                f'unknown preset of XLA options {name!r}; choose from {sorted(PRESETS)}, or give NAME=VALUE'
            )
        if not any(part in kind for part in PRESETS[name].kinds):
            raise InputError(
                f'XLA options {name!r} are for {" or ".join(PRESETS[name].kinds)}; this is a {kind!r}'
            )
        options |= PRESETS[name].options
    refused = unknown(options, mesh)
    if wrong := [name for name in refused if name in given]:
        raise InputError(
            f'this compiler (jaxlib {version("jaxlib")}) refuses the XLA options {", ".join(wrong)}; '
            'leave them out, or install the version that they are of'
        )
    for name in refused:
        logger.warning('left out the XLA option %s: jaxlib %s does not know it', name, version('jaxlib'))
        del options[name]
    return options


def unknown(options: Mapping[str, Value], mesh: Mesh) -> list[str]:
    """Which of the options the compiler for these devices does not know, or does not take the value of."""
    replicated = NamedSharding(mesh, PartitionSpec())
    lowered = jax.jit(lambda x: x, in_shardings=replicated).lower(jax.ShapeDtypeStruct((), 'float32'))

    def compiles(names: Sequence[str]) -> bool:
        try:
            chosen: dict[str, Any] = {name: options[name] for name in names}
            lowered.compile(compiler_options=chosen)
        except (jax.errors.JaxRuntimeError, ValueError, TypeError):
            return False
        return True

    if not options or compiles(list(options)):
        return []
    return [name for name in options if not compiles([name])]


def _value(text: str) -> Any:
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
