"""Compiling for TPUs that are not there: libtpu needs the name of a topology, and no chip.

XLA's own compiler for the chip decides what fits, what is communicated and what is scheduled; nothing is executed.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from llama_jax.preflight.chips import Topology
from llama_jax.preflight.roofline import Place
from llama_jax.types import InputError, PyTree, error_line

# XLA's warning that it copies a whole array to every device, as it finds no cheaper way from one sharding to another.
INVOLUNTARY = 'Involuntary full rematerialization'

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler assigned them.

    Attributes:
      arguments: state and batch.
      outputs: that do not lie in donated arguments.
      temporaries: all else that is held at the program's worst moment.
      host: in the host's memory, where activations are kept there.
    """

    arguments: int
    outputs: int
    temporaries: int
    host: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that fits, or why it does not.

    Attributes:
      executable: JAX's compiled function; None where it does not fit.
      memory: of the executable.
      needed: bytes of one device's main memory that a program too large asks for; 0 where it fits.
      available: bytes that XLA leaves to programs; 0 where it did not say.
      trace_seconds: of tracing and lowering.
      compile_seconds: of XLA.
      rematerializations: XLA's warnings of `INVOLUNTARY`, one line each.
    """

    executable: Any
    memory: Memory | None
    needed: int
    available: int
    trace_seconds: float
    compile_seconds: float
    rematerializations: tuple[str, ...]


def isolate_process() -> None:
    """Call before JAX has a backend: a CPU process of its own, whose libtpu only compiles, and warns on stderr."""
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # nobody to ask for the machine's TPU
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # no chip is used, so several may compile side by side
    os.environ['TPU_LOG_DIR'] = 'disabled'
    os.environ['TPU_MIN_LOG_LEVEL'] = os.environ['TPU_STDERR_LOG_LEVEL'] = '1'  # from warnings on
    for name in ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES'):
        os.environ.pop(name, None)  # of a pod that this process is not to join
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_enable_compilation_cache', False)  # what is read from a cache warns of nothing


def require_libtpu() -> None:
    """Raises `InputError` where the compiler for TPUs is not installed."""
    if importlib.util.find_spec('libtpu') is None:
        raise InputError(
            "preflight compiles with libtpu, which is not installed: pip install 'llama_jax[tpu]'"
        )


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, as `jax.devices()` would give them.

    Raises:
      InputError: libtpu does not know such a topology.
    """
    options: dict[str, Any] = {}
    if topology.num_slices > 1:
        options['num_slices'] = topology.num_slices
    if topology.chip_name == 'v4':
        options['chip_config_name'] = 'megacore'  # as a v4 chip is used: both cores as one device
    if topology.num_chips == 1:
        options['chips_per_host_bounds'] = (1,) * 3
    name = f'{topology.chip_name}:{"x".join(map(str, topology.shape))}'
    try:
        with captured_stderr():
            return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f'topology {topology}: libtpu refuses it: {error_line(error)}') from error


def places(mesh: Mesh) -> list[Place]:
    """Where the devices stand, in the mesh's order; on a platform without coordinates each is a chip of one line."""
    return [
        Place(getattr(d, 'slice_index', None) or 0, tuple(getattr(d, 'coords', None) or (index,)))
        for index, d in enumerate(mesh.devices.flat)
    ]


def compile_ahead(
    function: Any, *arguments: PyTree, compiler_options: dict[str, Any] | None = None
) -> Compiled:
    """Compiles a jitted function for abstract arguments with shardings on the devices of a topology.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    log: list[str] = []
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    executable, memory, needed, available = None, None, 0, 0
    try:
        with captured_stderr(log):
            executable = lowered.compile(compiler_options=compiler_options)
        memory = _memory(executable)
    except jax.errors.JaxRuntimeError as error:
        needed, available = parse_exhausted(str(error))
        if not needed:
            raise
    seconds = time.perf_counter() - traced
    warnings = tuple(line for line in log if INVOLUNTARY in line)
    return Compiled(executable, memory, needed, available, traced - start, seconds, warnings)


def _memory(executable: Any) -> Memory:
    stats = executable.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        host=stats.host_temp_size_in_bytes
        + stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes,
    )


def parse_exhausted(message: str) -> tuple[int, int]:
    """Bytes (needed, available) of XLA's refusal of a program that is too large; (0, 0) of any other message."""
    if 'RESOURCE_EXHAUSTED' not in message and 'Ran out of memory' not in message:
        return 0, 0
    number = r'\(?([\d.]+)([KMGT]?)\)?B?'
    for pattern in (rf'Used {number} of {number} hbm', rf'{number} exceeds available HBM \(?{number}'):
        if found := re.search(pattern, message):
            needed, unit, available, available_unit = found.groups()[:4]
            return int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[available_unit])
    return 1, 0


@contextlib.contextmanager
def captured_stderr(lines: list[str] | None = None) -> Iterator[None]:
    """Takes what C++ code writes to standard error, and appends it to `lines` at the end."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'stderr'
        with file.open('w+b') as target:
            os.dup2(target.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(saved, 2)
                os.close(saved)
                if lines is not None:
                    lines += file.read_text(errors='replace').splitlines()
