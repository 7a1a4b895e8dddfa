"""The process: multi-host start-up, logging, compilation cache, host sync, whole files, threads, preemption."""

import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

from llama_jax.types import InputError

logger = logging.getLogger('llama_jax')

T = TypeVar('T')


def initialize_distributed(coordinator: str = '', num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the processes of a multi-host job; does nothing for a single process.

    Args:
      coordinator: host:port of process 0; '' asks the cluster (TPU pods, Slurm, Open MPI) where there is one.
      num_processes: of the job; with `coordinator`.
      process_id: of this process, from 0; with `coordinator`.

    Raises:
      InputError: only some of the three are given.
    """
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if all(given):
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif any(given):
        raise InputError(
            f'coordinator={coordinator!r} num_processes={num_processes} process_id={process_id}: '
            'give all three to join processes by hand, or none'
        )
    elif _cluster_size() > 1:
        jax.distributed.initialize()


def _cluster_size() -> int:
    """Processes that the environment announces: TPU pod hosts, Slurm tasks, Open MPI ranks."""
    hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '')
    announced = (os.environ.get('SLURM_NTASKS'), os.environ.get('OMPI_COMM_WORLD_SIZE'))
    return max([len(hosts.split(',')), *(int(size) for size in announced if size)])


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


def enable_compilation_cache(directory: str = '') -> None:
    """Keeps compiled programs on disk, so that a second launch does not compile.

    Args:
      directory: where; '' is `$JAX_COMPILATION_CACHE_DIR`, else the user's cache folder. 'off' disables it.
    """
    if directory == 'off':
        return
    user_cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    chosen = (
        directory
        or os.environ.get('JAX_COMPILATION_CACHE_DIR')
        or str(Path(user_cache) / 'llama_jax' / 'xla')
    )
    jax.config.update('jax_compilation_cache_dir', chosen)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def sync_processes(name: str) -> None:
    """Waits until every process is here; `name` tells the meeting points apart."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def enable_bucket(path: str | os.PathLike) -> None:
    """Call before `path` is first looked at; does nothing where it is local.

    Raises:
      InputError: it is in a bucket, and the package that reaches it is missing.
    """
    if not os.fspath(path).startswith('gs://'):
        return
    if importlib.util.find_spec('gcsfs') is None:
        raise InputError(f"{os.fspath(path)} needs the package gcsfs: pip install 'llama_jax[gcs]'")
    import fsspec

    # Otherwise gcsfs answers from what a folder held at first; TensorStore and other processes write there too.
    for protocol in ('gs', 'gcs'):
        fsspec.config.conf.setdefault(protocol, {})['use_listings_cache'] = False


def write_atomically(path, data: bytes | str) -> None:
    """Writes a whole file: beside and renamed on a local disk, one object in a bucket; never half.

    Args:
      path: an `epath.Path`, local or `gs://...`; folders above it are made.
      data: bytes, or text to write as UTF-8.
    """
    data = data.encode() if isinstance(data, str) else data
    if '://' in os.fspath(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f'.{path.name}.{os.getpid()}.partial'
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def prefetch(jobs: Iterable[Callable[[], T]], threads: int = 2) -> Iterator[T]:
    """Results of the jobs in their order, the next few computed while one is used."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[T]] = []
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


class PreemptionSignal:
    """SIGTERM as a question that the training loop asks between steps.

    A second SIGTERM ends the process as usual. Only the main thread can catch signals; elsewhere the answer stays no.
    """

    def __init__(self):
        self._received = threading.Event()
        self._previous = None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, signum, frame):
        del signum, frame
        self._received.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def received(self, step: int) -> bool:
        """Whether to save and stop before `step`; with several processes all of them answer the same."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received.is_set()

    def close(self) -> None:
        """Gives the signal back to whoever handled it before."""
        if self._previous is not None and not self._received.is_set():
            signal.signal(signal.SIGTERM, self._previous)
