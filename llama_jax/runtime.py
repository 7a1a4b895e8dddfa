"""The process: multi-host start-up, logging, compilation cache, host sync, memory."""

import contextlib
import ctypes
import errno
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
from jax.experimental import multihost_utils

from llama_jax.errors import FAILURES, InputError, SystemFailure, error_line, kind_of

logger = logging.getLogger('llama_jax')

_PIECE = 16 << 10  # bytes that go to other processes at a time
_LOGGED: set[tuple[str, str]] = set()
_LOGGING = threading.Lock()


def initialize_distributed(
    coordinator: str = '', num_processes: int = 0, process_id: int = -1, timeout: float = 300.0
) -> None:
    """Joins the processes of a multi-host job; does nothing for a single process.

    Without arguments the cluster is asked: TPU pods (Compute Engine, GKE, slices of both), Slurm under `srun`, Open MPI
    up to 4. Open MPI 5 does not tell where process 0 is: there `coordinator` alone is enough.

    Args:
      coordinator: host:port of process 0.
      num_processes: of the job.
      process_id: of this process, from 0.
      timeout: seconds to wait for the other processes.

    Raises:
      InputError: only some of the three are given and the launcher does not tell the others; they are impossible; not
        all processes came in time; or there is a TPU whose pod cannot be asked.
    """
    ranks = _launcher_ranks()
    if coordinator and num_processes <= 0 and process_id < 0 and ranks:
        num_processes, process_id = ranks
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if all(given):
        if process_id >= num_processes:
            raise InputError(
                f'process_id={process_id} of num_processes={num_processes}: processes are numbered from 0 to '
                f'{num_processes - 1}'
            )
        if not coordinator.rpartition(':')[2].isdigit() or ':' not in coordinator:
            raise InputError(
                f'coordinator={coordinator!r}: give HOST:PORT, the host of process 0 and a free port'
            )
        try:
            _join(timeout, coordinator, num_processes, process_id, local_device_ids=_local_devices())
        except RuntimeError as error:  # of the service that process 0 starts
            raise InputError(
                f'process {process_id} cannot join at coordinator={coordinator} ({error_line(error)}); give the host '
                'of process 0 and a port that is free there'
            ) from error
    elif any(given):
        raise InputError(
            f'coordinator={coordinator!r} num_processes={num_processes} process_id={process_id}: '
            'give all three to join processes by hand, or none'
        )
    elif ranks and ranks[0] > 1:
        if 'OMPI_COMM_WORLD_SIZE' in os.environ and 'OMPI_MCA_orte_hnp_uri' not in os.environ:
            raise InputError(
                f'Open MPI started {ranks[0]} processes without telling where the first is; give each '
                'coordinator=HOST:PORT, the host of rank 0 and a free port'
            )
        _join(timeout, local_device_ids=_local_devices())
    elif _on_tpu_pod():
        try:
            _join(timeout)
        except InputError:
            raise
        except (
            Exception
        ) as error:  # of an HTTP client, a parser or a resolver: the metadata server's answers vary
            raise InputError(
                f'this machine has a TPU, but its pod cannot be asked ({type(error).__name__}: {error}); give '
                'coordinator, num_processes and process_id, or set TPU_SKIP_MDS_QUERY=1 if it is all there is'
            ) from error


def _join(timeout: float, *arguments: Any, **options: Any) -> None:
    """`jax.distributed.initialize`, given up after so many seconds: JAX itself would abort the process then."""
    failures: list[Exception] = []
    # On CPUs, programs in flight at the same time would meet each other's collectives, in an order of their own in each
    # process; that can end in waiting for ever.
    jax.config.update('jax_cpu_enable_async_dispatch', False)

    def initialize() -> None:
        try:
            jax.distributed.initialize(*arguments, initialization_timeout=int(timeout) + 60, **options)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise InputError(
            f'not all processes of the job have joined within {timeout:g} s; start each with the same command (by hand '
            'with its own process_id, and the coordinator where process 0 is), or wait longer'
        )
    if failures:
        raise failures[0]


def _launcher_ranks() -> tuple[int, int] | None:
    """(processes, this one's number) as `srun` or `mpirun` announce them; None where neither started this process."""
    environment = os.environ
    # A Slurm batch script has most of these too; only a step of `srun` has its list of nodes.
    if {'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_JOB_ID'} <= set(
        environment
    ):
        return int(environment['SLURM_NTASKS']), int(environment['SLURM_PROCID'])
    if 'OMPI_COMM_WORLD_SIZE' in environment:
        return int(environment['OMPI_COMM_WORLD_SIZE']), int(environment['OMPI_COMM_WORLD_RANK'])
    return None


def _local_devices() -> list[int] | None:
    """All GPUs of the node where a launcher started one process on it: JAX would take one GPU a process.

    None leaves it to JAX: one a process under a launcher, all devices otherwise.
    """
    tasks = os.environ.get('SLURM_STEP_TASKS_PER_NODE') or os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') or ''
    gpus = os.environ.get('SLURM_GPUS_ON_NODE') or ''
    visible = list(filter(None, os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')))
    count = len(visible) or (int(gpus) if gpus.isdigit() else 0)
    alone = tasks.partition('(')[0] == '1' and ',' not in tasks
    return list(range(count)) if alone and count > 1 else None


def _on_tpu_pod() -> bool:
    """Whether there is a TPU of a host that may be one of several: JAX then knows whom to ask for the others."""
    platforms = os.environ.get('JAX_PLATFORMS', '').split(',')
    hosts = os.environ.get('TPU_PROCESS_ADDRESSES') or os.environ.get('TPU_WORKER_HOSTNAMES') or ''
    if platforms[0] not in ('', 'tpu'):
        return False
    if hosts:  # GKE's
        return ',' in hosts or int(os.environ.get('MEGASCALE_NUM_SLICES') or 1) > 1
    # On import JAX looks for chips on the PCI bus, and marks the environment where it finds some with libtpu, or none.
    return os.environ.get('TPU_ML_PLATFORM') == 'JAX' and 'TPU_SKIP_MDS_QUERY' not in os.environ


def require_single_process(name: str) -> None:
    """Refuses to be one of several processes that a launcher started: all would do the same work, in one place.

    Raises:
      InputError: `srun` or `mpirun` started more than one.
    """
    if (ranks := _launcher_ranks()) and ranks[0] > 1:
        raise InputError(
            f'{name} runs in one process, and the launcher started {ranks[0]}; start it once, without one'
        )


def check_devices() -> None:
    """Looks for the devices for the first time.

    Raises:
      InputError: there are none of the kind that the environment asks for.
    """
    try:
        jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # of JAX, which asserts where a backend it knows finds no device
        asked = os.environ.get('JAX_PLATFORMS', '')
        reason = f' ({error_line(error)})' if str(error) else ''
        raise InputError(
            f'JAX finds no device with JAX_PLATFORMS={asked!r}{reason}; unset it, or install JAX for the devices '
            'of this machine'
        ) from error


def is_main_process() -> bool:
    """Whether this process logs and writes what is written once."""
    return jax.process_index() == 0


def setup_logging(level: int = logging.INFO) -> None:
    """One line a message on standard error, from process 0 only; other processes report warnings and worse."""
    if not is_main_process():
        level = logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def log_once(by: logging.Logger, level: int, message: str) -> None:
    """A line that a process logs once, however many threads come to it at the same time."""
    with _LOGGING:  # `functools.cache` would let in all that come before the first has returned
        is_new = (by.name, message) not in _LOGGED
        _LOGGED.add((by.name, message))
    if is_new:
        by.log(level, message)


def enable_compilation_cache(directory: str = '') -> None:
    """Keeps compiled programs on disk, so that a second launch does not compile.

    Args:
      directory: where; '' is `$JAX_COMPILATION_CACHE_DIR`, else the user's cache folder. 'off' disables it. Where none
        can be made, a line says so, and nothing is kept.
    """
    if directory == 'off':
        return
    user_cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    chosen = (
        directory
        or os.environ.get('JAX_COMPILATION_CACHE_DIR')
        or str(Path(user_cache) / 'llama_jax' / 'xla')
    )
    if '://' not in chosen:
        try:
            if chosen.startswith('~'):
                raise FileNotFoundError(errno.ENOENT, 'this user has no folder')
            os.makedirs(chosen, exist_ok=True)
            if not os.access(chosen, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            logger.warning(
                'compiled programs are not kept, and are made anew each time: %s: %s', chosen, error.strerror
            )
            return
    jax.config.update('jax_compilation_cache_dir', chosen)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@contextlib.contextmanager
def hears_compilations(hear: Callable[[float], object]) -> Iterator[None]:
    """Within, `hear` is told of each program that any thread compiles: in how many seconds."""

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == '/jax/core/compile/backend_compile_duration':
            hear(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def sync_processes(name: str) -> None:
    """Waits until every process is here; `name` tells the meeting points apart."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_main_process(array: np.ndarray) -> np.ndarray:
    """What process 0 holds, on every process; all give an array of one shape and dtype."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if jax.process_count() > 1 else array


def gather_texts(text: str) -> list[str]:
    """The text of each process, in their order, on all of them."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, max(int(sizes.max()), 1) - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def bytes_from_main_process(data: bytes) -> bytes:
    """What process 0 holds, on every process."""
    size = int(from_main_process(np.array(len(data))))
    own = np.frombuffer(data, np.uint8)[:size]
    pieces = np.pad(own, (0, -size % _PIECE + size - len(own))).reshape(
        -1, _PIECE
    )  # of one size: one program
    return b''.join(from_main_process(piece).tobytes() for piece in pieces)[:size]


@contextlib.contextmanager
def refused_by_all() -> Iterator[None]:
    """What one process fails with within, all fail with, so that none is left waiting; no collectives within.

    Raises:
      InputError: its own, or else that of the first process that has one.
      SystemFailure: another process has failed otherwise.
      Exception: whatever else this process has failed with.
    """
    own = None
    try:
        yield
    except Exception as error:
        own = error
    told = [kind_of(own), _tell(own)] if own else []
    found = [json.loads(text) for text in gather_texts(json.dumps(told))]
    if own:
        raise own
    for process, failure in enumerate(found):
        if failure:
            kind, line = failure
            raise FAILURES[kind](f'process {process}: {line}')


def _tell(error: Exception) -> str:
    return (
        str(error)
        if isinstance(error, InputError | SystemFailure)
        else f'{type(error).__name__}: {error_line(error)}'
    )


def leave_job(seconds: float = 10.0) -> bool:
    """Waits a moment for the other processes to end as well; whether all did.

    JAX would wait for minutes as the process ends. Where the others go on, waiting for this one in the middle of some
    computation, they learn that it is gone only when it is.
    """
    if not jax.distributed.is_initialized():
        return True
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def free_memory_at_once() -> None:
    """Has glibc give freed blocks of a megabyte and more back to the system; it keeps those of up to 32 MiB otherwise.

    A program that streams blocks through several threads then takes twice the memory. Elsewhere it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
