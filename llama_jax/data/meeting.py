"""Several machines that meet in a folder: each waits for what the others write, and hears when one gives up."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator

from etils import epath

from llama_jax.data.preparation import Machine
from llama_jax.errors import FAILURES, InputError, SystemFailure, error_line, kind_of
from llama_jax.json_file import read_object
from llama_jax.storage import write_atomically

BEGUN = 'config.json'  # where machines meet: what is prepared; it comes first, and goes first
_SECONDS_BETWEEN_LOOKS, _SECONDS_BEFORE_THE_FIRST_LINE, _SECONDS_BETWEEN_LINES = 0.5, 2.0, 60.0

_log = logging.getLogger(__name__)


class Meeting:
    """What one machine knows of the others.

    Attributes:
      machine: which one this is.
    """

    def __init__(self, folder: epath.Path, machine: Machine):
        """Args: folder: where they meet; it need not be there yet. machine: this one, which takes part from now on."""
        self.machine, self._folder = machine, folder
        self._own = folder / f'given-up-{machine.index:04d}.json'
        if machine.count > 1:
            self._own.unlink(missing_ok=True)
        self._known = self._said()  # of runs that have ended, and are started again

    def wait(self, is_there: Callable[[], bool], what: str | Callable[[], str]) -> None:
        """Returns when it is there; says soon, and then now and then, what is waited for.

        Raises:
          InputError: another machine has given up.
          SystemFailure: it has, and what failed was the system.
        """
        next_line = time.monotonic() + _SECONDS_BEFORE_THE_FIRST_LINE
        while not is_there():
            for name, line in self._said().items():
                if self._known.get(name) != line and name != self._own.name:
                    heard = json.loads(line)
                    raise FAILURES[heard['kind']](heard['line'])
            if time.monotonic() > next_line:
                next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
                _log.info('waiting for %s', what if isinstance(what, str) else what())
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Where this machine ends within, the others hear why: they would wait for ever."""
        try:
            yield
        except (InputError, SystemFailure) as error:
            if self.machine.count > 1 and (self._folder / BEGUN).exists() and self._said() == self._known:
                line = f'machine {self.machine.index} has given up: {error_line(error)}; mend that, and start all again'
                said = {'line': line, 'kind': kind_of(error), 'time': time.time_ns()}
                with contextlib.suppress(InputError):  # then all is done, and nobody waits
                    write_where_all_meet(self._own, json.dumps(said))
            raise

    def _said(self) -> dict[str, str]:
        if self.machine.count == 1 or not self._folder.exists():
            return {}
        said = {}
        with contextlib.suppress(FileNotFoundError):  # the folder goes at the end
            for file in self._folder.glob('given-up-*.json'):
                with contextlib.suppress(
                    InputError
                ):  # it goes where its machine starts again, and at the end
                    said[file.name] = json.dumps(read_object(file))
        return dict(sorted(said.items()))


def write_where_all_meet(file: epath.Path, text: str) -> None:
    """Writes a whole file into the folder, which does not come again where another machine has taken it away.

    Raises:
      InputError: it has.
    """
    gone = InputError(f'{file.parent} was taken away while something was to be written there; start again')
    if not (file.parent / BEGUN).exists():
        raise gone
    write_atomically(file, text)
    if not (file.parent / BEGUN).exists():  # it went just now, and writing has made the folder anew
        file.unlink(missing_ok=True)
        if '://' not in os.fspath(file):
            with contextlib.suppress(OSError):  # the other has not come to its end
                os.rmdir(file.parent)
        raise gone
