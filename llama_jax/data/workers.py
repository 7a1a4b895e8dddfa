"""Tasks in processes of their own: a dead process costs one more try of its task, not the work of the others."""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from llama_jax.errors import InputError, SystemFailure

_log = logging.getLogger(__name__)

Tell = Callable[[Any], None]
Work = Callable[[Any, Tell], Any]  # (task, tell) -> result; tells where it is now and then


class Workers:
    """Processes that do tasks, and go on to the next ones; a single worker is this process. For use with `with`."""

    def __init__(self, count: int):
        """Args: count: of processes; they are started when there is something to do."""
        self.count = count
        self._workers: list[_Worker] = []

    def __enter__(self) -> 'Workers':
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def run(
        self,
        tasks: Sequence[Any],
        work: Work,
        *,
        done: Callable[[Any, Any], None],
        told: Callable[[Any, Any], None] = lambda task, message: None,
        describe: Callable[[Any, Any], str] = lambda task, message: str(task),
    ) -> None:
        """Does all tasks, in any order.

        Args:
          tasks: can be pickled, as `work` can.
          work: what is done; the function of a module, or a partial of one.
          done: called with each task and its result.
          told: called with each task and what it tells.
          describe: (task, what it told last) -> what a line says of it.

        Raises:
          InputError: of a task; what the others do is of no use then, so leave the context.
          SystemFailure: of a task, or two processes died at the same one.
        """
        if self.count == 1:
            for task in tasks:
                done(task, work(task, lambda message, task=task: told(task, message)))
            return
        waiting, deaths, packed = list(reversed(tasks)), {}, pickle.dumps(work)
        workers = self._workers
        workers += [_Worker() for _ in range(min(self.count, len(tasks)) - len(workers))]
        while waiting or any(worker.busy for worker in workers):
            for worker in workers:
                if not worker.busy and waiting:
                    worker.give(packed, waiting.pop())
            ready = wait([worker.connection for worker in workers if worker.busy])
            for number, worker in enumerate(workers):
                if worker.connection not in ready:
                    continue
                task = worker.task
                try:
                    kind, content = worker.connection.recv()
                except (EOFError, OSError):
                    place, status = describe(task, worker.last), worker.end()
                    how = f'signal {-status}' if status < 0 else f'status {status}'
                    deaths[id(task)] = deaths.get(id(task), 0) + 1
                    if deaths[id(task)] > 1:
                        raise SystemFailure(
                            f'two workers ended by {how} at {place}; where memory is short, use fewer workers'
                        ) from None
                    _log.warning('a worker ended by %s at %s; it is tried once more', how, place)
                    waiting.append(task)
                    workers[number] = _Worker()
                    continue
                if kind == 'told':
                    worker.last = content
                    told(task, content)
                elif kind == 'done':
                    worker.busy = False
                    done(task, content)
                elif kind == 'defect':
                    raise RuntimeError(f'a worker failed at {describe(task, worker.last)}:\n{content}')
                else:
                    raise content


class _Worker:
    """A process, as its parent sees it."""

    def __init__(self):
        self.connection, theirs = Pipe()
        # Blocks of a megabyte go back to the system at once: else glibc keeps more and more, the longer a worker lives.
        kept = {'MALLOC_MMAP_THRESHOLD_': str(1 << 20), 'MALLOC_TRIM_THRESHOLD_': str(1 << 20)}
        environment = kept | os.environ
        environment |= {
            'PYTHONPATH': os.pathsep.join(filter(None, sys.path)),
            'RAYON_NUM_THREADS': '1',
            'JAX_PLATFORMS': 'cpu',
        }
        code = 'import sys; from llama_jax.data.workers import serve; serve(int(sys.argv[1]))'
        self._process = subprocess.Popen(
            [sys.executable, '-c', code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self.busy, self.task, self.last = False, None, None

    def give(self, packed: bytes, task: Any) -> None:
        self.busy, self.task, self.last = True, task, None
        with contextlib.suppress(OSError):  # it is dead, which shows when it is listened to
            self.connection.send((packed, task))

    def end(self) -> int:
        """Its status; it is killed where it goes on."""
        self.connection.close()
        if self._process.poll() is None:
            self._process.kill()
        return self._process.wait()


def serve(descriptor: int) -> None:
    """What a worker does until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent ends its workers
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection = Connection(descriptor)
    while True:
        try:
            packed, task = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            work = pickle.loads(packed)
            connection.send(('done', work(task, lambda message: connection.send(('told', message)))))
        except (InputError, SystemFailure) as error:
            connection.send(('refused', error))
        except BrokenPipeError:
            os._exit(0)
        except Exception:
            connection.send(('defect', traceback.format_exc()))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
