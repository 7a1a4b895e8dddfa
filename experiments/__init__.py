"""One file a verb: absl flags -> objects -> the library; what several verbs share stands in rooms."""

import os
import signal
import sys
from typing import Any, NoReturn


def begin_process() -> None:
    """What holds from the first moment on, before imports that take seconds; `launch.run` takes over the signals then.

    SIGINT and SIGTERM end the process at once, in a line. A standard stream that whoever started it has closed takes
    what is written and drops it, and no file gets its number.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signum, _end)
    for number, (name, mode) in enumerate((('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w'))):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, mode))


def _end(signum: int, frame: Any) -> NoReturn:
    del frame
    os.write(2, f'error: stopped by {signal.Signals(signum).name}\n'.encode())
    os._exit(128 + signum)


if sys.argv[:1] == ['-m']:  # `python -m experiments.pretrain`, say, whose module is being looked for
    begin_process()
