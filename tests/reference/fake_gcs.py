"""A small Google Cloud Storage in memory: the part of its public JSON API that TensorStore and gcsfs call.

Objects are written whole or not at all, are replaced and never changed, and folders do not exist. What an object store
lacks (append, rename, folders, composing) is refused with 405 and noted in `refused`; so is anything not known here.
Requests are counted by kind in `counts`. API: cloud.google.com/storage/docs/json_api/v1
"""

import base64
import collections
import email.parser
import email.policy
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable

import google_crc32c

_PAGE = 100  # objects a listing returns at most; the real limit is 1000


class Answered(Exception):
    """A request ends with this status; see `FakeGCS.before`."""


class FakeGCS:
    """A server on loopback, for use with `with`; buckets need not be made.

    Attributes:
      objects: (bucket, name) -> content.
      counts: requests by kind: insert, get, read, list, delete, copy, bucket.
      sent: bytes of content that were read, by name of the object.
      refused: what was asked for and an object store does not have.
      before: called with (kind, name) before each request takes effect; raising ConnectionError drops it, and Answered
        answers it with a status instead.
    """

    def __init__(self, before: Callable[[str, str], None] = lambda kind, name: None):
        self.objects: dict[tuple[str, str], bytes] = {}
        self.generations: dict[tuple[str, str], int] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.sent: collections.Counter[str] = collections.Counter()
        self.refused: list[str] = []
        self.before = before
        self._uploads: dict[str, tuple[str, str, dict, bytearray]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        handler = type('Handler', (_Handler,), {'store': self})
        self._server = _Server(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_port}'

    def __enter__(self) -> 'FakeGCS':
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment for `gs://` to lead here, without credentials."""
        return {
            'STORAGE_EMULATOR_HOST': self.url,  # gcsfs and google-cloud-storage, which Orbax asks about the bucket
            'TENSORSTORE_GCS_HTTP_URL': self.url,
            'CLOUD_STORAGE_EMULATOR_ENDPOINT': self.url,  # array_record
            'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',  # TensorStore looks for no other credentials
            'FSSPEC_GCS_TOKEN': 'anon',
            'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # gRPC, to find out what kind of bucket it is
            'NO_GCE_CHECK': 'true',
        }

    def names(self, prefix: str = '') -> list[str]:
        """Names of all objects that begin with `prefix`, which has the bucket first: `bucket/run/`."""
        with self._lock:
            return sorted(name for name in map('/'.join, self.objects) if name.startswith(prefix))

    # ---- What the API does -----------------------------------------------------------------------------------------

    def check(self, key: tuple[str, str], query: dict[str, str]) -> int:
        """0 where the preconditions hold, else the status that says they do not."""
        found = self.generations.get(key, 0)
        if 'ifGenerationMatch' in query and int(query['ifGenerationMatch']) != found:
            return 412
        if 'ifGenerationNotMatch' in query and int(query['ifGenerationNotMatch']) == found:
            return 304
        return 0

    def insert(self, key: tuple[str, str], data: bytes, query: dict[str, str]) -> tuple[int, dict]:
        with self._lock:
            if status := self.check(key, query):
                return 412 if status == 304 else status, {}
            self.objects[key] = bytes(data)
            self.generations[key] = 1_700_000_000_000_000 + next(self._numbers)
            return 200, self.describe(key)

    def describe(self, key: tuple[str, str]) -> dict:
        data = self.objects[key]
        checksum = google_crc32c.value(data).to_bytes(4, 'big')
        return {
            'kind': 'storage#object', 'bucket': key[0], 'name': key[1], 'size': str(len(data)),
            'id': f'{key[0]}/{key[1]}/{self.generations[key]}', 'generation': str(self.generations[key]),
            'metageneration': '1', 'contentType': 'application/octet-stream', 'storageClass': 'STANDARD',
            'md5Hash': base64.b64encode(hashlib.md5(data).digest()).decode(),
            'crc32c': base64.b64encode(checksum).decode(), 'etag': str(self.generations[key]),
            'timeCreated': '2024-01-01T00:00:00.000Z', 'updated': '2024-01-01T00:00:00.000Z',
            'mediaLink': f'{self.url}/download/storage/v1/b/{key[0]}/o/{urllib.parse.quote(key[1], "")}?alt=media',
        }  # fmt: skip

    def list(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
        limit = min(int(query.get('maxResults', _PAGE)), _PAGE)
        start, end = query.get('startOffset', ''), query.get('endOffset', '')
        entries: dict[str, bool] = {}  # name of an object, or prefix -> whether it is an object
        with self._lock:
            for name in sorted(name for held, name in self.objects if held == bucket):
                if not name.startswith(prefix) or name < start or (end and name >= end):
                    continue
                head, mark, rest = name[len(prefix) :].partition(delimiter) if delimiter else (name, '', '')
                is_folder = bool(mark) and not (
                    rest == '' and query.get('includeTrailingDelimiter') == 'true'
                )
                entries[prefix + head + mark if is_folder else name] = not is_folder
            after = query.get('pageToken', '')
            page = [name for name in sorted(entries) if name > after]
            shown = page[:limit]
            answer: dict = {'kind': 'storage#objects'}
            if objects := [self.describe((bucket, name)) for name in shown if entries[name]]:
                answer['items'] = objects
            if prefixes := [name for name in shown if not entries[name]]:
                answer['prefixes'] = prefixes
            if len(page) > limit:
                answer['nextPageToken'] = shown[-1]
            return answer


class _Server(http.server.ThreadingHTTPServer):
    """Says nothing when a client hangs up, as killed ones do."""

    request_queue_size = 64

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    store: FakeGCS
    protocol_version = 'HTTP/1.1'
    wbufsize = 1 << 16  # headers and body in one packet
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_GET

    def _answer(self) -> None:
        body = self._read_body()  # read also where it is refused, so that the connection stays usable
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        try:
            for method, pattern, handle in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command == method:
                    handle(self, query, body, *map(urllib.parse.unquote, match.groups()))
                    break
            else:
                self._refuse()
        except ConnectionError:
            self.close_connection = True
        except Answered as answered:
            self._send(answered.args[0], {})

    def _read_body(self) -> bytes:
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''):
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def _begin(self, kind: str, name: str) -> None:
        with self.store._lock:
            self.store.counts[kind] += 1
        self.store.before(kind, name)

    def _refuse(self) -> None:
        self.store.refused.append(f'{self.command} {self.path}')
        self._send(
            405, {'error': {'code': 405, 'message': f'an object store has no {self.command} {self.path}'}}
        )

    def _send(self, status: int, content: dict | bytes = b'', headers: dict[str, str] | None = None) -> None:
        if isinstance(content, dict):
            if status >= 400 and 'error' not in content:
                content = {'error': {'code': status, 'message': http.HTTPStatus(status).phrase}}
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Type': 'application/json', **(headers or {})}.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD' and status not in (204, 304):
            self.wfile.write(content)
        self.wfile.flush()

    # ---- Requests ---------------------------------------------------------------------------------------------------

    def _upload(self, query: dict[str, str], body: bytes, bucket: str) -> None:
        kind = query.get('uploadType')
        if 'upload_id' in query:
            self._upload_part(query['upload_id'], body)
        elif kind == 'media':
            self._insert((bucket, query['name']), body, query)
        elif kind == 'multipart':
            head = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'.encode()
            # Parsed as text once, for the name; the content is cut out of the bytes.
            boundary = (
                email.parser.BytesHeaderParser(policy=email.policy.HTTP).parsebytes(head).get_boundary()
            )
            _, metadata, content, _ = body.split(b'--' + boundary.encode(), 3)
            name = json.loads(re.split(rb'\r?\n\r?\n', metadata, maxsplit=1)[1])['name']
            data = re.split(rb'\r?\n\r?\n', content, maxsplit=1)[1]
            data = data[:-2] if data.endswith(b'\r\n') else data[:-1]
            self._insert((bucket, name), data, query)
        elif kind == 'resumable':
            name = query.get('name') or json.loads(body)['name']
            self._begin('upload', name)
            upload_id = f'upload{next(self.store._numbers)}'
            self.store._uploads[upload_id] = (bucket, name, query, bytearray())
            where = (
                f'{self.store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload_id}'
            )
            self._send(200, b'', {'Location': where})
        else:
            self._refuse()

    def _upload_part(self, upload_id: str, body: bytes) -> None:
        bucket, name, query, data = self.store._uploads[upload_id]
        first, total = re.fullmatch(
            r'bytes (?:\*|(\d+)-\d+)/(\*|\d+)', self.headers.get('Content-Range', f'bytes 0-0/{len(body)}')
        ).groups()
        if first is not None and int(first) != len(data):
            self._send(503, {})
            return
        if total == '*':
            data += body
            assert len(body) % (256 << 10) == 0, 'parts before the last are multiples of 256 KiB'
            self._send(308, b'', {'Range': f'bytes=0-{len(data) - 1}'} if data else {})
            return
        assert int(total) == len(data) + len(body)
        self._insert((bucket, name), data + body, query)
        del self.store._uploads[upload_id]  # what was dropped is sent again

    def _insert(self, key: tuple[str, str], data: bytes, query: dict[str, str]) -> None:
        self._begin('insert', key[1])
        self._send(*self.store.insert(key, data, query))

    def _get(self, query: dict[str, str], body: bytes, bucket: str, name: str) -> None:
        is_media = query.get('alt') == 'media'
        self._begin('read' if is_media else 'get', name)
        key = (bucket, name)
        with self.store._lock:
            if key not in self.store.objects:
                self._send(412 if int(query.get('ifGenerationMatch', 0)) else 404, {})
                return
            status, data = self.store.check(key, query), self.store.objects[key]
            metadata = self.store.describe(key)
        if status:
            self._send(status, {})
        elif not is_media:
            self._send(200, metadata)
        else:
            self._send_media(name, data, metadata)

    def _send_media(self, name: str, data: bytes, metadata: dict) -> None:
        headers = {
            'Content-Type': metadata['contentType'], 'ETag': metadata['etag'],
            'X-Goog-Generation': metadata['generation'], 'X-Goog-Stored-Content-Length': metadata['size'],
            'X-Goog-Hash': f'crc32c={metadata["crc32c"]}',
        }  # fmt: skip
        if match := re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', '')):
            size = len(data)
            first = int(match[1]) if match[1] else max(size - int(match[2]), 0)
            last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
            if first > last:
                self._send(416, {}, {'Content-Range': f'bytes */{size}'})
                return
            headers['Content-Range'] = f'bytes {first}-{last}/{size}'
            status, data = 206, data[first : last + 1]
        else:
            status = 200
        self.store.sent[name] += len(data)
        self._send(status, data, headers)

    def _list(self, query: dict[str, str], body: bytes, bucket: str) -> None:
        self._begin('list', query.get('prefix', ''))
        self._send(200, self.store.list(bucket, query))

    def _delete(self, query: dict[str, str], body: bytes, bucket: str, name: str) -> None:
        self._begin('delete', name)
        with self.store._lock:
            if (bucket, name) not in self.store.objects:
                self._send(412 if int(query.get('ifGenerationMatch', 0)) else 404, {})
            elif status := self.store.check((bucket, name), query):
                self._send(412 if status == 304 else status, {})
            else:
                del self.store.objects[bucket, name], self.store.generations[bucket, name]
                self._send(204)

    def _copy(
        self, query: dict[str, str], body: bytes, bucket: str, name: str, to_bucket: str, to: str
    ) -> None:
        self._begin('copy', name)
        with self.store._lock:
            if (bucket, name) not in self.store.objects:
                self._send(404, {})
                return
            data = self.store.objects[bucket, name]
            status, metadata = self.store.insert((to_bucket, to), data, query)
        size = str(len(data))
        answer = {'done': True, 'resource': metadata, 'totalBytesRewritten': size, 'objectSize': size}
        self._send(status, answer if status == 200 else {})

    def _bucket(self, query: dict[str, str], body: bytes, bucket: str) -> None:
        self._begin('bucket', bucket)
        self._send(
            200, {'kind': 'storage#bucket', 'name': bucket, 'id': bucket, 'location': 'US', 'etag': '1'}
        )


_BUCKET, _OBJECT = r'/storage/v1/b/([^/]+)', r'/o/([^/]+)'
_ROUTES = [
    ('POST', f'/upload{_BUCKET}/o', _Handler._upload),
    ('PUT', f'/upload{_BUCKET}/o', _Handler._upload),
    ('GET', f'(?:/download)?{_BUCKET}{_OBJECT}', _Handler._get),
    ('GET', f'{_BUCKET}/o', _Handler._list),
    ('DELETE', f'{_BUCKET}{_OBJECT}', _Handler._delete),
    ('POST', f'{_BUCKET}{_OBJECT}/rewriteTo/b/([^/]+){_OBJECT}', _Handler._copy),
    ('GET', f'{_BUCKET}/?', _Handler._bucket),
]


def main() -> None:
    """A server in a process of its own: prints its environment as JSON; each line it reads is a delay, in seconds."""
    delay = [0.0]
    with FakeGCS(lambda kind, name: time.sleep(delay[0])) as store:
        print(json.dumps(store.environment()), flush=True)
        for line in sys.stdin:
            delay[0] = float(line)
            print(json.dumps(store.counts), flush=True)


if __name__ == '__main__':
    main()
