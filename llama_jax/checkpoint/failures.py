"""Reads and writes of Orbax that fail: all of them are waited for, and one account is given."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that waits for all of its tasks before it closes."""

    def close(self) -> None:
        while not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


def _is_passed_on(record: logging.LogRecord) -> bool:
    """No traceback is; an error that Orbax goes on from is a line of this log."""
    if record.exc_info or record.levelno < logging.ERROR:
        return not record.exc_info
    logger.warning('%s', ' '.join(record.getMessage().split()))
    return False


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Around what Orbax reads or writes, here and in its threads: a failure is told by the exception alone.

    Where one array fails, Orbax closes its event loop beneath the others. They would end later, each with a traceback
    on standard error. And it logs the traceback of what it then raises, once for every thread that has met it.
    """
    policy, orbax = asyncio.get_event_loop_policy(), logging.getLogger('absl')
    asyncio.set_event_loop_policy(_PatientLoops())
    orbax.addFilter(_is_passed_on)
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(policy)
        orbax.removeFilter(_is_passed_on)
