"""A small interpreter that starts a program's process and its tests' process by `fork`, one pair at a time.

It runs no foreign code and never sees a program or a test: the tests' process reads both from a socket of its own, and
hands the program on. The program's process is forked before that socket is there, and keeps nothing open but its end of
the connection to the tests.

    evaluation --> keeper --+--> tests    (verdict: straight to the evaluation)
                            +--> warden --> program    (the warden ends it with all that it started)

Standard library alone; `llama_jax` itself is not imported here. Needs nothing of the evaluation's memory or files.
"""

import contextlib
import importlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable

from llama_jax.grading import isolation, program_tests

# Programs find these loaded.
_MODULES = ('collections', 'functools', 'heapq', 'itertools', 'math', 'random', 're', 'string', 'typing')
_PROCESSES = 64  # threads count
REFUSED = 200  # in place of a signal: the system did not give a program what it is kept in


def main(arguments: list[str]) -> None:
    """Serves until the control socket ends.

    Args:
      arguments: descriptor of the control socket, 1 for namespaces or 0, seconds, memory, file and disk in bytes.
    """
    descriptor, isolated, memory, file_size, disk_size = map(int, [*arguments[:2], *arguments[3:]])
    control, seconds = socket.socket(fileno=descriptor), float(arguments[2])
    for name in _MODULES:
        importlib.import_module(name)
    try:
        if isolated:
            user = isolation.enter_namespaces(tempfile.mkdtemp(prefix='llama_jax_root_'))
        else:
            user = isolation.unprivileged_user()
        keeper = _Keeper(control, bool(isolated), user, seconds, memory, file_size, disk_size)
        keeper.fork_program()
        if keeper.end_program() == REFUSED:
            raise OSError('a process may not have a folder of its own')
        keeper.fork_program()
    except BaseException as error:
        control.sendall(f'{type(error).__name__}: {error}'.encode())
        return
    control.sendall(b'ready')
    while keeper.run_pair():
        keeper.fork_program()
    keeper.end_program()


class _Keeper:
    def __init__(
        self,
        control: socket.socket,
        isolated: bool,
        user: int | None,
        seconds: float,
        memory: int,
        file_size: int,
        disk_size: int,
    ):
        self.control, self.isolated, self.user, self.seconds = control, isolated, user, seconds
        self.memory, self.file_size, self.disk_size = memory, file_size, disk_size

    def fork_program(self) -> None:
        """Starts the warden of the next program, which waits for its source."""
        self.channel, theirs = socket.socketpair()
        watched, self.leash = os.pipe()
        self.warden = os.fork()
        if self.warden == 0:
            self._become(lambda: self._guard(theirs, watched), theirs.fileno(), watched)
        theirs.close()
        os.close(watched)

    def run_pair(self) -> bool:
        """Waits for an order, gives it to a tests' process, ends the pair when told to; False at the end of orders."""
        order, descriptors, _, _ = socket.recv_fds(self.control, 1, 1)
        if not order or not descriptors:
            return False
        tests = os.fork()
        if tests == 0:
            verdicts = socket.socket(fileno=descriptors[0])
            self._become(lambda: self._test(verdicts, self.channel), verdicts.fileno(), self.channel.fileno())
        os.close(descriptors[0])
        self.control.recv(1)
        os.kill(tests, signal.SIGKILL)
        os.waitpid(tests, 0)
        self.control.sendall(bytes([self.end_program()]))
        return True

    def end_program(self) -> int:
        """The signal that the program had ended by before; 0 for none, or REFUSED."""
        self.channel.close()
        os.close(self.leash)
        return os.waitstatus_to_exitcode(os.waitpid(self.warden, 0)[1])

    def _become(self, task: Callable[[], int], *kept: int) -> None:
        """The rest of a forked child's life: its task, with nothing open but what is named."""
        status = 1
        try:
            low = 3
            for descriptor in sorted(kept):
                os.closerange(low, descriptor)
                low = descriptor + 1
            os.closerange(low, 4096)
            status = task()
        finally:
            os._exit(status)

    def _test(self, verdicts: socket.socket, channel: socket.socket) -> int:
        isolation.drop_privileges(self.user)
        isolation.limit_resources(self.seconds, self.memory, 0, None)
        program_tests.grade(verdicts, channel)
        return 0

    def _guard(self, channel: socket.socket, watched: int) -> int:
        """The warden: starts the program and ends it with all that it left, when the other end of the leash closes."""
        folder = None
        try:
            if self.isolated:
                isolation.enter_own_folder(self.disk_size, self.user)
            else:
                isolation.adopt_orphans()
                folder = os.path.realpath(tempfile.mkdtemp(prefix='llama_jax_code_'))
                os.chdir(folder)
                if self.user is not None:
                    os.chown(folder, self.user, self.user)
            program = os.fork()
        except OSError:
            return REFUSED
        if program == 0:
            self._become(lambda: self._serve(channel, folder), channel.fileno())
        channel.close()
        os.read(watched, 1)
        ended_by = _end(program)
        if folder is not None:
            _kill_orphans()
            _remove(folder)
        return ended_by

    def _serve(self, channel: socket.socket, folder: str | None) -> int:
        os.setsid()
        os.environ.update(HOME=folder or isolation.FOLDER, TMPDIR=folder or isolation.FOLDER)
        tempfile.tempdir = None
        isolation.drop_privileges(self.user)
        counted = (
            self.isolated or self.user is not None
        )  # else the limit would count the user's other processes
        isolation.limit_resources(self.seconds, self.memory, self.file_size, _PROCESSES if counted else None)
        isolation.refuse_in_python(folder)
        for name in [name for name in sys.modules if name.partition('.')[0] == 'llama_jax']:
            del sys.modules[name]
        sys.argv[:] = sys.orig_argv[:] = ['program.py']
        program_tests.serve(channel)
        return 0


def _end(program: int) -> int:
    """Ends a child and gives the signal that had ended it before; 0 for none.

    One that is on its way out closes its connection a moment before it can be waited for. What it ends by is settled by
    then, and no later signal changes it.
    """
    ended, status = os.waitpid(program, os.WNOHANG)
    if not ended:
        _kill(program)
        _, status = os.waitpid(program, 0)
    signal_number = max(0, -os.waitstatus_to_exitcode(status))
    return 0 if not ended and signal_number == signal.SIGKILL else signal_number


def _kill(process: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _kill_orphans() -> None:
    """Ends what the program had started and left behind, where the kernel has made that ours."""
    path = f'/proc/self/task/{os.getpid()}/children'
    while os.path.exists(path):
        with open(path) as file:
            children = [int(child) for child in file.read().split()]
        if not children:
            return
        for child in children:
            _kill(child)
            os.waitpid(child, 0)


def _remove(folder: str) -> None:
    """Removes a folder whatever a program has made of it: nested deeper than Python follows, or closed to its owner."""
    os.chdir('/')
    with contextlib.suppress(OSError, RecursionError):
        shutil.rmtree(folder)
        return
    for command in (['chmod', '-R', 'u+rwx', folder], ['rm', '-rf', folder]):
        path = shutil.which(command[0], path='/bin:/usr/bin')
        if path and stat.S_ISDIR(os.lstat(folder).st_mode):
            subprocess.run([path, *command[1:]], stderr=subprocess.DEVNULL, check=False)
