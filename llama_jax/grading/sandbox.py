"""Judges generated Python: runs it in a process that may use little and reach nothing, and compares in another.

Layers, each of which holds without the others:
  - two processes: the program's own is handed arguments and returns values; tests, expected results and the verdict are
    in a second one, which never ran the program (`grading.program_tests`);
  - namespaces (user, mount, process, network, ...) where the kernel permits: of the files there are Python's own, to
    read, and an empty folder in memory that is gone with the program; no interface to send on; no process outlives it;
  - resource limits: CPU time, address space, size of files, open files, processes, no core dump;
  - a wall-clock limit, after which program and tests are killed;
  - an empty environment, closed standard input, output that nobody reads;
  - an audit hook that refuses sockets and new processes and, without namespaces, files outside the program's folder.
    Native code gets around it. Without namespaces it stands alone, and a warning says so: use a container.
"""

import contextlib
import dataclasses
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import weakref

from llama_jax.errors import InputError
from llama_jax.grading.keeper import REFUSED
from llama_jax.grading.program_tests import ProgramTest, receive, send
from llama_jax.runtime import log_once

_LOG = logging.getLogger(__name__)
# Makes `llama_jax` a package without its `__init__`, which would load JAX.
_START = """
import sys, types
package = types.ModuleType('llama_jax')
package.__path__ = [sys.argv.pop(1)]
sys.modules['llama_jax'] = package
from llama_jax.grading import keeper
keeper.main(sys.argv[1:])
"""
# The order of sets is the same in every run.
_ENVIRONMENT = {'PATH': '/nonexistent', 'PYTHONHASHSEED': '0', 'OPENBLAS_NUM_THREADS': '1'}
_WITHOUT_NAMESPACES = (
    'generated programs get no namespaces of their own here ({}): resource limits and a hook in Python contain them, '
    'which native code gets around; use a container for models that you do not trust'
)
_PATIENCE = 60.0  # seconds for what is done in milliseconds where nothing else runs
_MAX_VERDICT = 1 << 16


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
      seconds: of wall-clock time, and of CPU time.
      memory_bytes: of address space.
      file_bytes: size of one file.
      disk_bytes: of all its files together; without namespaces only `file_bytes` holds.
    """

    seconds: float = 3.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    disk_bytes: int = 1 << 24


@dataclasses.dataclass(frozen=True)
class CodeExecution:
    """The sandbox, as a grader: `Graders(run_code=CodeExecution(allowed=True))`.

    Safe to call from several threads; each keeps a small process, which ends with this object.

    Attributes:
      allowed: must be said; generated code is run by nobody who did not ask for it.
      limits: of one program.
    """

    allowed: bool = False
    limits: Limits = Limits()
    _idle: queue.SimpleQueue['_Keeper'] = dataclasses.field(
        default_factory=queue.SimpleQueue, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.allowed:
            raise InputError('executing generated code is off; it must be allowed')
        if sys.platform not in ('linux', 'darwin'):
            raise InputError(f'no sandbox for generated code on {sys.platform}; run on Linux or macOS')

    def __call__(self, test: ProgramTest) -> str:
        """Runs a program and its tests: 'passed', or what happened instead, in one line."""
        for _ in range(2):
            try:
                keeper = self._idle.get_nowait()
            except queue.Empty:
                keeper = _Keeper(self.limits)
            try:
                verdict = keeper.run(test)
            except (OSError, EOFError):  # an idle one may have been killed meanwhile; a new one may not
                keeper.close()
                continue
            self._idle.put(keeper)
            return verdict
        return 'failed: it ended the sandbox'


class _Keeper:
    """A process of `grading.keeper` and the connection to it."""

    def __init__(self, limits: Limits):
        self.limits = limits
        reason = self._start(isolated=sys.platform == 'linux')
        if reason:
            log_once(_LOG, logging.WARNING, _WITHOUT_NAMESPACES.format(reason))
            reason = self._start(isolated=False)
            if reason:
                raise OSError(f'the sandbox for generated code does not start: {reason}')

    def _start(self, isolated: bool) -> str:
        """Why it did not start; '' where it did."""
        limits = self.limits
        self.control, theirs = socket.socketpair()
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        numbers = (limits.seconds, limits.memory_bytes, limits.file_bytes, limits.disk_bytes)
        process = subprocess.Popen(
            [
                sys.executable, '-P', '-s', '-B', '-X', 'utf8', '-c', _START, package, str(theirs.fileno()),
                str(int(isolated)), *map(str, numbers),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd='/',
            env=_ENVIRONMENT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self.close = weakref.finalize(self, _end, process, self.control)
        self.control.settimeout(_PATIENCE)
        try:
            answer = self.control.recv(1000).decode()
        except OSError as error:
            answer = str(error)
        if answer == 'ready':
            return ''
        self.close()
        return answer or 'its process ended'

    def run(self, test: ProgramTest) -> str:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(self.control, [b'.'], [theirs.fileno()])
            verdict = self._verdict(ours, test)
        self.control.sendall(b'.')
        status = self.control.recv(1)
        if not status:
            raise EOFError('the process that keeps the sandbox is gone')
        if status[0] == REFUSED:
            raise InputError(
                'the sandbox of generated programs cannot be set up any more: is the memory used up?'
            )
        if status[0] and verdict.startswith('failed: it left'):
            return f'failed: killed by {signal.Signals(status[0]).name}'
        return verdict

    def _verdict(self, ours: socket.socket, test: ProgramTest) -> str:
        start = time.monotonic()
        ours.settimeout(self.limits.seconds)
        try:
            send(ours, json.dumps(dataclasses.asdict(test)).encode())
            verdict = receive(ours, _MAX_VERDICT).decode('utf-8', 'replace')
        except (OSError, EOFError, ValueError):
            if time.monotonic() - start >= self.limits.seconds:
                return f'timed out after {self.limits.seconds:g} s'
            return 'failed: its tests ended without a verdict'
        verdict = ' '.join(verdict.split())[:200]
        return 'failed: out of memory' if verdict.startswith('failed: MemoryError') else verdict


def _end(process: subprocess.Popen, control: socket.socket) -> None:
    """Its children end with the keeper, which ends with the connection; what does not is killed."""
    with contextlib.suppress(OSError):  # it has ended already
        control.shutdown(socket.SHUT_RDWR)
    control.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
