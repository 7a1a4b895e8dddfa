"""Runs generated Python in a subprocess that may use little time, memory and disk, and no network.

Layers, each of which holds without the others:
  - its own session, killed as a whole (`killpg`) when the wall-clock limit passes, and in any case at the end;
  - resource limits: CPU time, address space, file size, open files, processes, no core dump;
  - an empty environment, an empty temporary directory as home and working directory, closed standard input;
  - standard output and error go to a pipe of which a bounded part is read; writing more kills the program;
  - user, network and process-id namespaces of its own (`unshare`) where the kernel permits: no interface to send on,
    and no process outlives the first. Elsewhere sockets and new processes are refused in Python (an audit hook, which
    a program that means harm through native code can get around: use a container for models you do not trust).
It is not a security boundary against a hostile author; files that the user may read are readable.
"""

import contextlib
import dataclasses
import functools
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from llama_jax.types import InputError

# Runs before the program, as its own interpreter starts: limits first, then the hook, which cannot be taken off again.
_GUARD = r"""
import os, resource, sys
def limit(which, value):
    soft, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
cpu, memory, file_size, mark, path = sys.argv[1:6]
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_CPU, int(cpu))
limit(resource.RLIMIT_AS, int(memory))
limit(resource.RLIMIT_FSIZE, int(file_size))
limit(resource.RLIMIT_NOFILE, 64)
limit(resource.RLIMIT_NPROC, 1)
sys.argv[:] = ['program.py']
REFUSED = (
    'socket.', 'os.fork', 'os.forkpty', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.system', 'os.kill', 'os.killpg',
    'subprocess.Popen', 'pty.spawn', 'ctypes.dlsym', 'ctypes.call_function', 'resource.setrlimit', 'resource.prlimit',
    'ftplib.', 'http.client.', 'imaplib.', 'nntplib.', 'poplib.', 'smtplib.', 'telnetlib.', 'urllib.Request',
    'webbrowser.', 'syslog.', 'sys.addaudithook', 'gc.get_objects',
)
def hook(event, args, refused=REFUSED, exit=PermissionError):
    if event.startswith(refused):
        raise exit(f'the sandbox refuses {event}')
sys.addaudithook(hook)
del hook, limit, resource
source = open(path).read()
space = {'__name__': '__main__', '__file__': 'program.py'}

def run(exec=exec, compile=compile, stdout=sys.stdout, write=os.write, mark=mark.encode()):
    exec(compile(source, 'program.py', 'exec'), space)
    stdout.flush()
    write(1, b'\n' + mark)  # tells a program that ran to its end from one that left with status 0
run()
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
      seconds: of wall-clock time, and of CPU time.
      memory_bytes: of address space.
      file_bytes: size of one file.
      output_bytes: of standard output and error together.
    """

    seconds: float = 3.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    output_bytes: int = 1 << 16


@dataclasses.dataclass(frozen=True)
class CodeExecution:
    """The sandbox, as a judge: `Judges(run_code=CodeExecution(allowed=True))`.

    Attributes:
      allowed: must be said; generated code is run by nobody who did not ask for it.
      limits: of one program.
    """

    allowed: bool = False
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not self.allowed:
            raise InputError('executing generated code is off; allow it with --allow_code_execution')
        if sys.platform not in ('linux', 'darwin'):
            raise InputError(f'no sandbox for generated code on {sys.platform}; run on Linux or macOS')

    def __call__(self, program: str) -> str:
        """Runs a program to its end: 'passed', or what happened instead, in one line."""
        with tempfile.TemporaryDirectory(prefix='llama_jax_code_') as folder:
            path = os.path.join(folder, 'program.py')
            with open(path, 'w', encoding='utf-8', errors='surrogateescape') as file:
                file.write(program)
            return self._run(path, folder)

    def _run(self, path: str, folder: str) -> str:
        limits, isolated, mark = self.limits, _can_unshare(), secrets.token_hex(16)
        arguments = [
            sys.executable, '-I', '-B', '-X', 'utf8', '-c', _GUARD, str(int(limits.seconds) + 1),
            str(limits.memory_bytes), str(limits.file_bytes), mark, path,
        ]  # fmt: skip
        process = subprocess.Popen(
            [*_unshare(), *arguments] if isolated else arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={'HOME': folder, 'TMPDIR': folder, 'PATH': '/nonexistent', 'OPENBLAS_NUM_THREADS': '1'},
            start_new_session=True,
        )
        try:
            output, ended = _read(process, limits)
        finally:
            _kill_session(process)
        if ended:
            return ended
        return _verdict(output.decode('utf-8', 'replace'), process.returncode, mark)


def _read(process: subprocess.Popen, limits: Limits) -> tuple[bytes, str]:
    """Output until the program ends, and why it had to be stopped ('' where it ended itself)."""
    assert process.stdout is not None
    deadline, output = time.monotonic() + limits.seconds, b''
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:  # every writer is gone
                try:
                    process.wait(max(deadline - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    break
                return output, ''
            output += chunk
            if len(output) > limits.output_bytes:
                return output, f'failed: more than {limits.output_bytes} bytes of output'
    return output, f'timed out after {limits.seconds:g} s'


def _kill_session(process: subprocess.Popen) -> None:
    """Ends the program and what it started, however it stands."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def _verdict(output: str, status: int, mark: str) -> str:
    lines = output.rstrip().split('\n')
    if status == 0:
        return 'passed' if lines[-1] == mark else 'failed: it left before its end'
    if status < 0:
        return f'failed: killed by {signal.Signals(-status).name}'
    last = lines[-1][:200]
    if 'MemoryError' in last:
        return 'failed: out of memory'
    return f'failed: {last or f"exit status {status}"}'


def _unshare() -> list[str]:
    """The command that gives a program namespaces of its own; [] where there is no such command."""
    command = shutil.which('unshare')
    return [command, '--user', '--net', '--pid', '--fork', '--kill-child', '--'] if command else []


@functools.cache
def _can_unshare() -> bool:
    """Whether the kernel lets this user make namespaces; containers often do not."""
    if sys.platform != 'linux' or not _unshare():
        return False
    done = subprocess.run(
        [*_unshare(), sys.executable, '-I', '-S', '-c', ''], capture_output=True, timeout=30
    )
    return done.returncode == 0
