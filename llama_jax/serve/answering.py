"""Answers on their way to a client: whole, or as a stream of server-sent events; a client that goes away ends them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, Protocol, TypeVar

from sse_starlette.sse import AppStatus, EventSourceResponse, SendTimeoutError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from llama_jax.serve.refusal import Refusal

_T = TypeVar('_T')

# Seconds that a client may read nothing of a stream before the connection is given up.
_SEND_SECONDS = 30.0
# A server that ends lets streams end first, which this package would cut off.
AppStatus.disable_automatic_graceful_drain()


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Answer(Protocol):
    """To one request."""

    async def whole(self) -> dict[str, Any]:
        """All of it."""
        ...

    def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """It as it is made."""
        ...


async def unless_gone(request: Request, answer: Awaitable[_T]) -> _T:
    """The answer, which is given up where the client goes away first.

    Raises:
      ClientGone: it has.
    """
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending


async def _until_gone(request: Request) -> None:
    while (await request.receive())['type'] != 'http.disconnect':
        pass


def line(value: Any) -> str:
    """JSON of one line; a number that is not finite would be a defect."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(',', ':'))


class EventStream(EventSourceResponse):
    """A stream whose client may stop reading."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events, while somebody reads them."""
        with contextlib.suppress(SendTimeoutError):
            await super().__call__(scope, receive, send)


async def stream(
    request: Request, chunks: AsyncGenerator[dict[str, Any], None], ends_by_done: bool = True
) -> EventStream:
    """The chunks as events, [DONE] behind them; what goes wrong after the first is an event too.

    Raises:
      Refusal: something is wrong before the first.
      ClientGone: the client went away before it.
    """
    first = await unless_gone(request, anext(chunks))

    async def events() -> AsyncIterator[str | bytes]:
        try:
            yield _event(first)
            async for chunk in chunks:
                yield _event(chunk)
        except Refusal as refusal:
            yield f'event: error\ndata: {line(refusal.to_json())}\n\n'.encode()
            return
        finally:
            await chunks.aclose()
        if ends_by_done:
            yield b'data: [DONE]\n\n'

    return EventStream(events(), sep='\n', send_timeout=_SEND_SECONDS)


def _event(chunk: dict[str, Any]) -> bytes:
    kind = f'event: {chunk["type"]}\n' if isinstance(chunk.get('type'), str) else ''
    return f'{kind}data: {line(chunk)}\n\n'.encode()
