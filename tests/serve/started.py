"""The server as a command, started, as clients have it."""

import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import socket
import threading

import httpx2
import openai

from tests.command_line import Finished, wait_for


@dataclasses.dataclass(frozen=True)
class Started:
    """One that runs.

    Attributes:
      pids: of its process, or of several, of which the first speaks to clients.
      address: of all paths.
      client: the official one.
      ended: how each of them has.
    """

    pids: list[int]
    address: str
    client: openai.OpenAI
    ended: concurrent.futures.Future

    def get(self, path: str) -> int:
        """The status of a path; 0: nobody answers."""
        try:
            return httpx2.get(f'{self.address}/{path}', timeout=30).status_code
        except httpx2.TransportError:
            return 0

    def metrics(self) -> str:
        """What monitoring reads."""
        return httpx2.get(f'{self.address}/metrics', timeout=30).text

    def done(self, seconds: float = 60) -> Finished:
        """How the first has ended, which is waited for."""
        return self.ended.result(seconds)[0]

    def end(self, signum: int = signal.SIGTERM) -> Finished:
        """What a signal makes of it."""
        os.kill(self.pids[0], signum)
        return self.done()


def free_port() -> int:
    """On which nobody listens."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(commands, checkpoint, *flags, before='', until='ready', seconds=500, **job):
    """A server of a checkpoint, once a path of its answers; what has not ended then is killed.

    Args:
      commands: start it.
      checkpoint: that it serves.
      flags: more of its own.
      before: Python that it runs first.
      until: the path.
      seconds: that it may take to answer there.
      job: of `commands.start_processes`, where there are several.
    """
    port = free_port()
    given = 'serve', f'--checkpoint={checkpoint}', f'--port={port}', *flags
    start = commands.start_processes if job else lambda *given, **options: [commands.start(*given, **options)]
    pids = start(*given, before=before, **job)
    ended = concurrent.futures.Future()
    waiter = threading.Thread(target=lambda: ended.set_result(commands.wait_processes(pids, 1400)))
    waiter.start()
    address = f'http://127.0.0.1:{port}'
    client = openai.OpenAI(base_url=f'{address}/v1', api_key='any', max_retries=0)
    server = Started(pids, address, client, ended)
    try:
        wait_for(lambda: server.get(until) == 200 or ended.done(), seconds)
        assert not ended.done(), ended.result()[0].stderr
        yield server
    finally:
        client.close()
        for pid in pids if not ended.done() else ():
            os.kill(pid, signal.SIGKILL)
        waiter.join(60)
