"""Answers on their way to a client: whole, or as a stream of server-sent events; a client that goes away ends them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, TypeVar

from sse_starlette.sse import AppStatus, EventSourceResponse, SendTimeoutError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from llama_jax.serve.refusal import Refusal

_T = TypeVar('_T')
# What an answer is made of, each as JSON; to be closed by whoever takes them.
Chunks = AsyncGenerator[dict[str, Any], None]

# Seconds that a client may read nothing of a stream before the connection is given up.
_SEND_SECONDS = 30.0
# A server that ends lets streams end first, which this package would cut off.
AppStatus.disable_automatic_graceful_drain()


async def unless_gone(request: Request, answer: Awaitable[_T]) -> _T:
    """The answer, which is given up where the client goes away first.

    Raises:
      ClientDisconnect: it has.
    """
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending


async def _until_gone(request: Request) -> None:
    while (await request.receive())['type'] != 'http.disconnect':
        pass


async def joined(chunks: Chunks) -> dict[str, Any]:
    """The answer that the chunks of completions, or of a chat, add up to."""
    whole, choices = {}, {}
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            whole |= chunk
            for choice in chunk['choices']:
                choices[choice['index']] = _sum(choices.get(choice['index']), choice)
    for choice in choices.values():
        if (message := choice.pop('delta', None)) is not None:
            choice['message'] = message
            for call in message.get('tool_calls', ()):
                message['content'] = None
                del call['index']
    kind = whole['object'].removesuffix('.chunk')
    return whole | {'object': kind, 'choices': [choices[index] for index in sorted(choices)]}


def _sum(before: Any, new: Any) -> Any:
    """Texts and lists grow, objects do so by their fields; otherwise what is new counts."""
    if before is None or new is None:
        return before if new is None else new
    if isinstance(new, dict):
        return before | {key: _sum(before.get(key), value) for key, value in new.items()}
    return before + new if isinstance(new, str | list) else new


class EventStream(EventSourceResponse):
    """A stream whose client may stop reading."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events, while somebody reads them."""
        with contextlib.suppress(SendTimeoutError):
            await super().__call__(scope, receive, send)


async def stream(request: Request, chunks: Chunks) -> EventStream:
    """The chunks as events; what goes wrong after the first is an event too.

    Raises:
      Refusal: something is wrong before the first.
      ClientDisconnect: the client went away before it.
    """
    chunk = await unless_gone(request, anext(chunks))

    async def events(chunk: dict[str, Any]) -> AsyncIterator[str | bytes]:
        async with contextlib.aclosing(chunks):
            try:
                yield _event(chunk)
                async for chunk in chunks:
                    yield _event(chunk)
            except Refusal as refusal:
                yield _event(refusal.to_json(), 'error')
                return
        if 'type' not in chunk:  # events that have one end by one of their own
            yield b'data: [DONE]\n\n'

    return EventStream(events(chunk), sep='\n', send_timeout=_SEND_SECONDS)


def _event(value: dict[str, Any], kind: str = '') -> bytes:
    """In lines; a number that is not finite would be a defect."""
    kind = kind or value.get('type', '')
    data = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(',', ':'))
    return (f'event: {kind}\n' * bool(kind) + f'data: {data}\n\n').encode()
