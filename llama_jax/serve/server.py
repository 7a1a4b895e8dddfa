"""The process of a server: it listens at once, loads meanwhile, and ends when all that runs has ended."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from llama_jax.errors import InputError
from llama_jax.serve.app import make_app
from llama_jax.serve.served import Served
from llama_jax.serve.service import Limits, Service
from llama_jax.serve.ticket import SOCKET_BYTES

_log = logging.getLogger(__name__)
_LOOPBACK = ('127.0.0.1', 'localhost', '[::1]')
# In which those who wait hear why there is no answer.
_LAST_WORDS_SECONDS = 1.0


def listen(host: str, port: int) -> socket.socket:
    """A socket on which nothing is accepted yet.

    Raises:
      InputError: the address is none of this machine, or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Else megabytes of an answer would wait there for a client who reads nothing. Linux takes twice as much.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES // 2)
        listener.bind(address)
    except OSError as error:
        raise InputError(
            f'port {port} of {host} cannot be listened on: {error.strerror}; give another'
        ) from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in ('localhost', '::1') or host.startswith('127.')


def hosts_of(host: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Names by which a server may be called: where nobody needs a key those of this machine alone."""
    return () if keys or not is_loopback(host) else (*_LOOPBACK, host)


def serve(
    load: Callable[[], Served], limits: Limits, listener: socket.socket, drain_seconds: float
) -> BaseException | None:
    """Serves until a signal ends it.

    Args:
      load: the model, in the thread in which it then runs.
      limits: of the server.
      listener: where clients come.
      drain_seconds: for what runs when the first signal comes; a second one ends at once.

    Returns:
      Why it has failed; None where it was ended.
    """
    service = Service(limits)
    config = uvicorn.Config(
        make_app(service), log_config=None, access_log=False, server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=5, h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    server = _Server(config, service, drain_seconds)
    service.worker.start(load, server.end_by_failure)
    server.run([listener])
    if not service.worker.close():
        os._exit(0)  # Python would take down what the thread compiles with
    return service.worker.failure


class _Server(uvicorn.Server):
    """Uvicorn's, which ends when all answers have."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float):
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal: nothing new is taken. A second one ends at once."""
        del frame
        if self._service.is_draining:
            os._exit(128 + sig)
        self._service.is_draining = True
        threading.Thread(target=self._drain, daemon=True, name='drain').start()

    def _drain(self) -> None:
        _log.info('ending: %d answers are still being given', self._service.worker.num_rows)
        end = time.monotonic() + self._drain_seconds
        while self.server_state.tasks and time.monotonic() < end:
            time.sleep(0.05)
        if self.server_state.tasks:
            self._service.worker.give_up()
            time.sleep(_LAST_WORDS_SECONDS)
        if self.server_state.tasks:  # of clients that do not read
            for connection in list(self.server_state.connections):
                connection.loop.call_soon_threadsafe(connection.transport.abort)
        self.should_exit = True

    def end_by_failure(self) -> None:
        """There will be no more answers; who waits is told so first."""
        time.sleep(_LAST_WORDS_SECONDS)
        self.should_exit = True
