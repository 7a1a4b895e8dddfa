"""JSON that others wrote: read within limits of size, of nesting and of numbers, or refused in one line.

Every file of JSON that the library reads goes through here. Python's own parser takes a gigabyte for some ten megabytes
of brackets, and ends in errors of several kinds where text is nested deep or a number has thousands of digits.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from llama_jax.errors import InputError, SystemFailure, error_line

MAX_BYTES = 128 << 20  # of a file, of one line of JSON lines, and of what is read as one document
_MAX_VALUES = (
    8_000_000  # of a text, each of up to 90 bytes in memory; the largest tokenizer.json has a million
)
_MAX_DEPTH = 100  # of an object; whatever walks through it later must not run out of stack
_MAX_DIGITS = 300  # of an object's numbers, all of which Python can also turn into floats and back
_PATH_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def parse_json(data: bytes | str, place: str) -> Any:
    """The value of a JSON text of any kind; `place` names it in messages.

    Raises:
      InputError: it is no JSON, or beyond the limits.
    """
    return _parse(data, place)


def parse_object(data: bytes | str, place: str) -> dict[str, Any]:
    """The object in a JSON text that describes something, such as a model or a tokenizer.

    Raises:
      InputError: as `parse_json`; or it is no object, nested deep, or has a key twice or what is no number.
    """
    value = _parse(
        data,
        place,
        object_pairs_hook=_unique,
        parse_constant=_refuse_constant,
        parse_int=_whole_number,
        parse_float=_real_number,
    )
    if not isinstance(value, dict):
        raise InputError(f'{place} is a JSON {type(value).__name__}, it must be an object')
    if isinstance(data, str) or re.search(rb'\\u[dD][89a-fA-F]', data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f'{place} holds half a character ({error.object[error.start]!a})') from None
    if _is_deep(value):
        raise InputError(f'{place} nests its values more than {_MAX_DEPTH} deep; copy or download it again')
    return value


def read_object(path: epath.Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
      InputError: as `parse_object`; or the file cannot be read, or is larger than `max_bytes`.
    """
    return parse_object(read_bytes(path, max_bytes), str(path))


def check_replaceable(path: epath.Path, keys: Collection[str]) -> None:
    """Refuses to write a report where something else is: an older one, an object with these keys, may be replaced.

    Raises:
      InputError: the file is there, and neither such an object nor empty.
    """
    if not path.exists():
        return
    try:
        is_ours = not (data := read_bytes(path)) or set(keys) <= parse_object(data, str(path)).keys()
    except InputError:
        is_ours = False
    if not is_ours:
        raise InputError(f'{path} is there and is no report of this kind; remove it, or name another file')


def read_bytes(path: epath.Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file.

    Raises:
      InputError: it is not there, or larger than `max_bytes`.
      SystemFailure: the system cannot read it.
    """
    try:
        with path.open('rb') as file:
            data = read_at_most(file, max_bytes + 1)
    except OSError as error:
        is_closed = error.errno is None and str(error).startswith('Forbidden')  # as a bucket's client says it
        kind = InputError if is_closed or isinstance(error, _PATH_ERRORS) else SystemFailure
        raise kind(f'{path} cannot be read: {error.strerror or error_line(error)}') from error
    if len(data) > max_bytes:
        raise InputError(f'{path} has more than {max_bytes} bytes; no such file is that large')
    return data


def read_at_most(file: Any, count: int) -> bytes:
    """So many bytes of an open file, or as many as there are; unlike `read`, it takes no memory for what is not."""
    data = bytearray()
    while len(data) < count and (block := file.read(min(1 << 20, count - len(data)))):
        data += block
    return bytes(data)


def read_lines(file: Any, name: str, max_bytes: int = MAX_BYTES) -> Iterator[bytes]:
    """The lines of a `io.BufferedReader` or `gzip.GzipFile`, one in memory at a time.

    Raises:
      InputError: one has more than `max_bytes`; it is refused before the rest of it is read.
    """
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            raise InputError(f'{name} line {number} has more than {max_bytes >> 20} MiB; cut it into several')
        yield line


_MARK = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL
)  # a string, the beginning of one, or what divides


def read_array(file: Any, name: str, max_bytes: int = MAX_BYTES) -> Iterator[bytes]:
    """The texts of an array's items, one in memory at a time; they are not parsed.

    Raises:
      InputError: one has more than `max_bytes`, or the array does not end where the file does.
    """
    data, place, depth, number = bytearray(), 0, 0, 0  # `data` begins with the item
    while True:
        match = _MARK.search(data, place)
        if match is None or match[0] == b'"':
            place = match.start() if match else len(data)
            if len(data) > max_bytes:
                raise InputError(
                    f'{name} record {number} has more than {max_bytes >> 20} MiB; cut it into several'
                )
            if not (
                block := read_at_most(file, max(1 << 16, len(data)))
            ):  # twice as much: a long string is not
                raise InputError(
                    f'{name} is cut short: its array does not end; copy it again'
                )  # gone over often
            data += block
            continue
        place = match.end()
        opens, ends = match[0] in b'[{', match[0] in b']}'
        if depth == 1 and (ends or match[0] == b','):
            text = bytes(data[: match.start()]).strip()
            if text or number or match[0] == b',':
                yield text
            number += 1
        if (depth == 0 and opens) or (depth == 1 and (ends or match[0] == b',')):
            del data[:place]
            place = 0
        depth += opens - ends
        if depth <= 0:
            break
    if rest := bytes(data).strip():
        raise InputError(f'{name} goes on behind its array with {show_json(rest[:40])}; one array is read')
    while block := file.read(1 << 16):
        if block.strip():
            raise InputError(f'{name} goes on behind its array; one array is read')


def show_json(value: object) -> str:
    """A foreign value, or what was wrong with it, as a message can hold it: one line, not long."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (ValueError, RecursionError):
        return 'a huge number' if isinstance(value, int) else f'a {type(value).__name__}'
    text = ' '.join(text.split())
    return text if len(text) <= 120 else f'{text[:120]}...'


def _parse(data: bytes | str, place: str, **options: Any) -> Any:
    comma, bracket, brace = (',', '[', '{') if isinstance(data, str) else (b',', b'[', b'{')
    values = 0
    if len(data) > _MAX_VALUES:  # a shorter text cannot have more
        values = sum(data.count(mark) for mark in (comma, bracket, brace))  # pyright: ignore[reportArgumentType]
    if len(data) > MAX_BYTES or values > _MAX_VALUES:
        raise InputError(
            f'{place} has {len(data)} characters and up to {values} values; at most {MAX_BYTES} and {_MAX_VALUES} '
            'are read as one JSON text'
        )
    try:
        return json.loads(data if isinstance(data, str) else data.decode('utf-8-sig'), **options)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = show_json(error).partition('; use sys.')[0] or type(error).__name__
        raise InputError(f'{place} is not JSON: {reason}; copy it again, or mend it') from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f'the key {show_json(name)} stands twice')
    return values


def _refuse_constant(constant: str) -> object:
    raise ValueError(f'{constant} is no number')


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f'a number has {len(digits)} digits, at most {_MAX_DIGITS} are read')
    return int(digits)


def _real_number(text: str) -> float:
    if abs(value := float(text)) == float('inf'):
        raise ValueError(f'{text[:40]} is beyond the largest number')
    return value


def _is_deep(value: object) -> bool:
    layer = [value]
    for _ in range(_MAX_DEPTH):
        children = (v.values() if isinstance(v, dict) else v for v in layer)
        if not (layer := [item for child in children for item in child if isinstance(item, dict | list)]):  # type: ignore
            return False
    return True
