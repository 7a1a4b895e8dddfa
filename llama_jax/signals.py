"""Signals that ask a process to end: SIGTERM (a preemption), SIGINT (Ctrl-C) and SIGUSR1 (a scheduler's warning).

A command ends at once, in one line (`Interrupts`); the training loop saves first (`PreemptionSignal`).
"""

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Seconds that the main thread has to come back to Python, from a compilation say, and those it then has to clear up.
_PATIENCE, _CLEARING_UP = 5.0, 30.0
_AFTER_FINALISER = 0.05


class Interrupted(KeyboardInterrupt):
    """A signal came where nothing is lost by ending at once.

    Attributes:
      signum: of the signal; 0 where another process of the job got it.
      handler: that raised it, and is called again where Python drops what is raised, as in a finaliser.
    """

    def __init__(self, signum: int = 0, handler: Callable[[int, Any], object] | None = None):
        super().__init__(signum)
        self.signum, self.handler = signum, handler


class Interrupts:
    """What a command does with the signals: each raises `Interrupted` in the main thread, a second of its kind kills.

    A main thread that stays outside Python, or takes too long to clear up, is not waited for: the line is written and
    the process ends.
    """

    def __init__(self, resumable: bool = False):
        """Args: resumable: the same command goes on, so that a stopped one ends well: with status 0, not 128 + N."""
        self._resumable = resumable

    def install(self) -> None:
        """Takes the signals; to be called again after joining a job, where JAX takes SIGTERM. In the main thread."""
        if jax.distributed.is_initialized():
            _jax_handler()
        _watch()
        _raise_dropped_again()
        for signum in ENDING:
            signal.signal(signum, self)

    def __call__(self, signum: int, frame: Any) -> None:
        """What the system calls when a signal comes."""
        del frame
        signal.signal(signum, signal.SIG_DFL)
        _later(_CLEARING_UP, lambda: self._end_at_once(signum))
        raise Interrupted(signum, self)

    def end(self, interrupted: Interrupted) -> NoReturn:
        """Ends the process with a line that names the signal, when what is to be done at its end is done.

        What was cut off may still run on XLA's threads, and must not find the interpreter gone: it is not torn down.
        """
        if jax.distributed.is_initialized():
            self._end_at_once(interrupted.signum)  # JAX would wait for the other processes
        self._say(interrupted.signum)
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - as Python itself: other threads first
        atexit._run_exitfuncs()
        os._exit(self._status(interrupted.signum))

    def end_unless_heard(self, signum: int) -> None:
        """Ends the process where the main thread has not come back to Python since the signal."""
        if signal.getsignal(signum) is self:
            self._end_at_once(signum)

    def _end_at_once(self, signum: int) -> NoReturn:
        self._say(signum)
        os._exit(self._status(signum))

    def _say(self, signum: int) -> None:
        name = signal.Signals(signum).name if signum else 'a signal to another process'
        line = (
            f'stopped by {name}; the same command goes on' if self._resumable else f'error: stopped by {name}'
        )
        with contextlib.suppress(OSError):
            os.write(2, f'{line}\n'.encode())

    def _status(self, signum: int) -> int:
        return 0 if self._resumable else 128 + (signum or signal.SIGTERM)


def _later(seconds: float, call: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


@functools.cache
def _watch() -> None:
    """Hears signals while the main thread is outside Python, where no handler of ours runs; once a process."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)

    def watch() -> None:
        unheard = {}
        while True:
            for signum in os.read(reader, 64):
                # Each of our handlers gives way to the default when it runs: one that is still there has not run.
                handler = signal.getsignal(signum)
                ours = isinstance(getattr(handler, '__self__', handler), Interrupts | PreemptionSignal)
                if ours and unheard.get(signum) == handler:
                    os._exit(128 + signum)
                unheard[signum] = handler
                if isinstance(handler, Interrupts):
                    _later(_PATIENCE, functools.partial(handler.end_unless_heard, signum))

    threading.Thread(target=watch, daemon=True, name='signals').start()


@functools.cache
def _raise_dropped_again() -> None:
    """Has an `Interrupted` that Python would print and drop raised once more; once a process."""
    otherwise = sys.unraisablehook

    def hook(dropped: Any) -> None:
        error = dropped.exc_value
        if not isinstance(error, Interrupted) or error.handler is None:
            otherwise(dropped)
            return
        signal.signal(
            error.signum, functools.partial(error.handler)
        )  # another object: it is no second signal
        main = threading.main_thread().ident or 0
        _later(_AFTER_FINALISER, functools.partial(signal.pthread_kill, main, error.signum))

    sys.unraisablehook = hook


def _forget() -> None:
    """A forked process's signals are its own business."""
    signal.set_wakeup_fd(-1)
    for signum in ENDING:
        if isinstance(signal.getsignal(signum), Interrupts):
            signal.signal(signum, signal.SIG_DFL)


@functools.cache
def _jax_handler() -> Callable[[int], None] | None:
    """JAX's own handler of SIGTERM, which tells the other processes of the job; None where it has none.

    It stands below Python, whose `signal` cannot give it back. To be called before SIGTERM is taken from it.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    pointer = libc.signal(signal.SIGTERM, None)
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(pointer) if pointer else None


class PreemptionSignal:
    """The signals as a question that the training loop asks between steps.

    A second signal of a kind ends the process as usual. Only the main thread can catch signals; elsewhere the answer
    stays no. With several processes all get one answer, so all must ask equally often.
    """

    def __init__(self):
        self._signum = 0
        self._agreed = False
        self._asked = 0
        self._interruptible = False
        self._previous: dict[int, Any] = {}
        self._tell_job: Callable[[int], None] | None = None

    def listen(self) -> None:
        """Takes the signals, until `close`; before, they are whose they were."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        if jax.process_count() > 1:
            self._tell_job = _jax_handler()
        _raise_dropped_again()
        self._previous = {signum: signal.signal(signum, self._receive) for signum in ENDING}

    def _receive(self, signum: int, frame: Any) -> None:
        del frame
        signal.signal(signum, signal.SIG_DFL)
        self._signum = signum
        if jax.process_count() > 1:
            if self._tell_job:
                self._tell_job(signal.SIGTERM)
        elif self._interruptible:
            raise Interrupted(signum, self._receive)

    def received(self) -> bool:
        """Whether to save and stop here."""
        if jax.process_count() == 1:
            return bool(self._signum)
        self._asked += 1
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed

    def raise_received(self) -> None:
        """Ends what is being done here, on all processes, where a signal has come.

        Raises:
          Interrupted: it has.
        """
        if self.received():
            raise Interrupted(self._signum)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around what may be cut off anywhere: a signal raises within, at once where there is one process.

        Raises:
          Interrupted: a signal has come, before or within.
        """
        try:
            self._interruptible = True
            self.raise_received()
            yield
        finally:
            self._interruptible = False

    def close(self) -> None:
        """Gives the signals back to whoever handled them before."""
        for signum, handler in self._previous.items():
            if signum != self._signum:
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
