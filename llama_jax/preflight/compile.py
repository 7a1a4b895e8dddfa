"""Compiling for TPUs that are not there: libtpu needs the name of a topology, and no chip.

XLA's own compiler for the chip decides what fits, what is communicated and what is scheduled; nothing is executed.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from llama_jax.chips import find
from llama_jax.errors import InputError, error_line
from llama_jax.preflight.roofline import Place
from llama_jax.preflight.topology import Topology
from llama_jax.types import PyTree

# XLA's warning that it copies a whole array to every device, as it finds no cheaper way from one sharding to another.
INVOLUNTARY = 'Involuntary full rematerialization'

logger = logging.getLogger(__name__)

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device's main memory while the program runs, and of its host's.

    Attributes:
      arguments: state and batch.
      outputs: that do not lie in donated arguments.
      temporaries: the block that XLA reserves for all else that the program holds, gaps in it included.
      code: the program itself.
      host: in the host's memory, where activations are kept there.
      statistics: what `memory_analysis()` says, by name; see docs/preflight.md for why it is not what is printed.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    host: int
    statistics: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes on a device."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program, or why there is none.

    Attributes:
      executable: JAX's compiled function; None where XLA refuses it.
      memory: of the executable; None where XLA refuses it.
      needed: bytes of one device's main memory that the program asks for, its arguments included; 1 where XLA refuses
        it without saying how much.
      available: bytes of one device's main memory that XLA leaves to programs.
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

    @property
    def fits(self) -> bool:
        """Whether a chip holds it."""
        return self.memory is not None and self.needed <= self.available


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


def available_bytes(device: Any) -> int:
    """Main memory of a device that XLA leaves to programs: some less than it has, and more than nobody writes down.

    It names the figure where it refuses a program, so it is asked for one that needs twice all there could be.
    """
    chip = find(device.device_kind)
    assert chip is not None and chip.torus is not None, device
    too_large = jax.ShapeDtypeStruct(
        (2 * chip.hbm_bytes // 2**20, 2**20), 'uint8', sharding=SingleDeviceSharding(device)
    )
    try:
        with captured_stderr():
            jax.jit(jnp.invert).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        if available := parse_exhausted(str(error))[1]:
            return available
    return chip.hbm_bytes // chip.devices


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
    with tempfile.TemporaryDirectory() as folder:
        options = dict(compiler_options or {}) | {'xla_dump_to': folder}
        try:
            with captured_stderr(log):
                executable = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed, available = parse_exhausted(str(error))
            if not needed:
                raise
        seconds = time.perf_counter() - traced
        # One of each program that came of it, the largest of which is the step.
        reports = Path(folder).glob('*memory-usage-report.txt')
        reserved = max((parse_report(file.read_text()) for file in reports), default=0)
    needed = reserved or needed
    if executable is not None:
        memory = _memory(executable.memory_analysis(), reserved)
        needed = memory.total
    if not available:
        available = available_bytes(_a_device(arguments))
    warnings = tuple(line for line in log if INVOLUNTARY in line)
    return Compiled(executable, memory, needed, available, traced - start, seconds, warnings)


def _a_device(arguments: PyTree) -> Any:
    shardings = (getattr(leaf, 'sharding', None) for leaf in jax.tree.leaves(arguments))
    return next(iter(next(filter(None, shardings)).device_set))


def _memory(stats: Any, reserved: int) -> Memory:
    """Of XLA's statistics, and of what it reserved on a device, the code aside; 0: it did not say."""
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    if not reserved:
        reserved = stats.peak_memory_in_bytes
        logger.warning(
            'XLA reported no assignment of memory: what is held at the worst moment is taken for what it reserves, '
            'which is some per cent more'
        )
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=outputs,
        temporaries=max(0, reserved - stats.argument_size_in_bytes - outputs),
        code=stats.generated_code_size_in_bytes,
        host=stats.host_temp_size_in_bytes
        + stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes,
        statistics={name: getattr(stats, name) for name in dir(stats) if name.endswith('_in_bytes')},
    )


def parse_report(text: str) -> int:
    """Bytes of main memory (XLA's space 0) that its memory usage report counts; 0 where there are none in it."""
    found = re.search(r'^Memory Space: .*\(color=0\)\s+Total bytes: (\d+)', text, re.MULTILINE)
    return int(found[1]) if found else 0


def parse_exhausted(message: str) -> tuple[int, int]:
    """Bytes (needed, available) of XLA's refusal of a program that is too large; (0, 0) of any other message.

    What is needed counts the arguments too, though one of the messages speaks of temporaries. (1, 0): it is not said.
    """
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
