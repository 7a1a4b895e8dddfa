"""Who may ask: keys, names of the server, sizes of bodies; around the whole application, before anything is read."""

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_jax.serve.refusal import Refusal, bad
from llama_jax.serve.service import Service

# Open without a key: what watches the server asks for them, and none tells of what is asked.
_OPEN = frozenset({'/', '/health', '/ready', '/metrics'})


class Access:
    """Lets those pass who may ask; `scope['state']['key']` then tells whose the request is."""

    def __init__(self, app: ASGIApp, service: Service):
        """Args: app: of the service, to be guarded."""
        self._app, self._service, self._hosts = app, service, service.limits.hosts
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.limits.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or passes on."""
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers.get('host', ''))
            scope.setdefault('state', {})['key'] = self._key(scope, headers)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        self._service.num_answering += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.num_answering -= 1

    def _check_host(self, host: str) -> None:
        """A page elsewhere whose name leads here must not use a server that needs no key."""
        name = host.rpartition(':')[0] if ':' in host and not host.endswith(']') else host
        if self._hosts and name not in self._hosts:
            raise Refusal(
                403,
                f'the server is not called {name!r} here; {self._hosts[0]} is its name, other names need keys',
            )

    def _key(self, scope: Scope, headers: Headers) -> str:
        if not self._keys or scope['method'] == 'OPTIONS' or scope['path'] in _OPEN:
            return ''
        kind, _, given = headers.get('authorization', '').partition(' ')
        if kind.lower() != 'bearer' or not given.strip():
            raise Refusal(401, 'a key is needed: Authorization: Bearer KEY', code='missing_api_key')
        digest = hashlib.sha256(given.strip().encode()).digest()
        if not any([hmac.compare_digest(digest, known) for known in self._keys]):  # as long for each
            raise Refusal(401, 'the key is none of this server', code='invalid_api_key')
        return digest.hex()[:16]


async def read_body(request: Request, most: int) -> bytes:
    """A body, of which no more is read than may be.

    Raises:
      Refusal: it is larger, or said to be no JSON.
    """
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'application/json':
        raise Refusal(415, f'the content type is {kind or "none"}; it must be application/json')
    length = request.headers.get('content-length', '')
    if length.isdecimal() and int(length) > most:
        raise Refusal(413, f'the body has {length} bytes; it may have {most}')
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise Refusal(413, f'the body has more than {most} bytes, which it may have')
    if not body:
        raise bad('the body is empty; it must be JSON')
    return bytes(body)
