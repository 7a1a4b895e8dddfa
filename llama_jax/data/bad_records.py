"""Records that are of no use: the first one stops, or all are counted and left out."""

import logging

from llama_jax.errors import InputError

_log = logging.getLogger(__name__)


def check_on_error(on_error: str) -> None:
    """Refuses what is neither 'stop' nor 'skip'.

    Raises:
      InputError: says so.
    """
    if on_error not in ('stop', 'skip'):
        raise InputError(f'on_error is {on_error!r}; it is stop, at the first bad record, or skip')


class BadRecords:
    """What is done with records that are of no use: the first one stops, or all are counted and left out.

    Attributes:
      count: those left out.
      named: what is wrong with the first five.
    """

    def __init__(self, on_error: str = 'stop'):
        """Args: on_error: 'stop' or 'skip'. Raises InputError otherwise."""
        check_on_error(on_error)
        self._skip = on_error == 'skip'
        self.count = 0
        self.named: list[str] = []

    def add(self, error: InputError) -> None:
        """Counts one; raises `error` instead where records are not left out."""
        if not self._skip:
            raise InputError(f'{error}; mend it, or leave such records out (on_error skip)') from error
        self.count += 1
        if self.count <= 5:
            self.named.append(str(error))

    def log(self) -> None:
        """Says how many were left out, and names the first."""
        if self.count:
            _log.warning('left out %d bad records, the first: %s', self.count, '; '.join(self.named))
