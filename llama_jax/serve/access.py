"""Who may ask: keys, names of the server, sizes of bodies; around the whole application, before anything is read."""

import hashlib
import hmac
import re
from collections.abc import Sequence

from etils import epath
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_jax.errors import InputError
from llama_jax.json_file import read_bytes
from llama_jax.serve.refusal import Refusal, bad

# Open without a key: what watches the server asks for them, and none tells of what is asked.
_OPEN = frozenset({'/', '/health', '/ready', '/metrics'})
_MAX_FILE = 1 << 20  # bytes of a file of keys
_KEY = re.compile(r'[!-~]{8,512}')


class Access:
    """Lets those pass who may ask; `scope['state']['key']` then tells whose the request is."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], keys: Sequence[str]):
        self._app, self._hosts = app, hosts
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or passes on."""
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers.get('host', '').lower())
            scope.setdefault('state', {})['key'] = self._key(scope, headers)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

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


def read_keys(path: str) -> tuple[str, ...]:
    """Keys, one a line; empty lines and those that begin with # do not count.

    Raises:
      InputError: there are none, or one is none; the line is named, and the key is not shown.
    """
    keys = []
    for number, line in enumerate(
        read_bytes(epath.Path(path), _MAX_FILE).decode('utf-8-sig', 'replace').splitlines(), 1
    ):
        key = line.strip()
        if not key or key.startswith('#'):
            continue
        if not _KEY.fullmatch(key):
            raise InputError(
                f'{path} line {number} is no key; a key has 8 to 512 letters, digits and signs, and no spaces'
            )
        keys.append(key)
    if not keys:
        raise InputError(f'{path} holds no keys; write one a line')
    return tuple(keys)
