"""Ways to damage a file: its bytes at random, what a JSON text says, the fields of a sentencepiece model."""

import base64
import json
from typing import Any

import numpy as np

# 4- and 8-byte little-endian numbers that readers of lengths, counts, offsets and scores trip over.
_NUMBERS = [0, 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_NUMBERS += [
    int.from_bytes(np.array(x, kind).tobytes(), 'little')
    for x in (np.nan, np.inf, 1e38, 1e300)
    for kind in ('<f8',)
]
_NUMBERS += [0x7F800000, 0x7FC00000, 0xFF7FFFFF]  # of float32: infinite, none, the least


def damaged_bytes(data: bytes, rng: np.random.Generator, dense: list[tuple[int, int]]) -> bytes:
    """A copy truncated, or with bits flipped, numbers replaced, pieces copied, cut out, put in or filled.

    Args:
      data: the file.
      rng: chooses.
      dense: spans where most of what a reader parses lies; seven of ten copies are damaged there.
    """
    copy = bytearray(data)
    place = int(rng.integers(len(data)))
    if dense and rng.random() < 0.7:
        sizes = np.array([stop - start for start, stop in dense])
        start, stop = dense[int(rng.choice(len(dense), p=sizes / sizes.sum()))]
        place = int(rng.integers(start, stop))
    match int(rng.integers(8)):
        case 0:
            del copy[place if rng.random() < 0.3 else int(rng.integers(len(data))) :]
        case 1:
            copy[place] ^= 1 << int(rng.integers(8))
        case 2:
            number = _NUMBERS[int(rng.integers(len(_NUMBERS)))]
            size = int(rng.choice([1, 2, 4, 8]))
            copy[place : place + size] = (number % 256**size).to_bytes(size, 'little')
        case 3:
            some = rng.integers(0, 256, size=int(rng.integers(1, 9)), dtype=np.uint8)
            copy[place : place + len(some)] = bytes(some)
        case 4:
            del copy[place : place + int(rng.integers(1, 65))]
        case 5:
            source = int(rng.integers(len(data)))
            piece = data[source : source + int(rng.integers(1, 257))]
            copy[place : place + len(piece)] = piece
        case 6:
            size = int(rng.integers(1, 65))
            copy[place : place + size] = bytes(size)
        case 7:
            size = int(rng.integers(1, 65))
            copy[place:place] = bytes(size) if rng.random() < 0.5 else copy[place : place + size]
    return bytes(copy)


# What stands in the wrong place, or is too large, or no number.
_VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-300, 1e39, 1e308),
    *(float('nan'), float('inf'), '', ' ', 'a', '▁', '\0', '\ud800', 'é' * 40, 'x' * 5000, '9' * 400, '<s>'),
    *([], {}, [[]], [0], [None], ['a', 'b'], {'a': 1}, [1] * 5000),
]
# Parts of a tokenizer.json as anybody can write them: what takes for ever, what panics, what grows, what nothing knows.
_PATTERNS = [
    '(a+)+$',
    '(?:a|a)*b',
    '(x+x+)+y',
    '(((((',
    '\\',
    '(?<=a*)b',
    '',
    '.*',
    '[[:alpha:]]{1,9999}',
    r'\p{Xx}',
]
_PARTS: list[dict[str, Any]] = [
    *({'type': 'Split', 'pattern': {'Regex': p}, 'behavior': 'Isolated', 'invert': False} for p in _PATTERNS),
    *({'type': 'Replace', 'pattern': {'Regex': p}, 'content': 'xx'} for p in _PATTERNS),
    {'type': 'Replace', 'pattern': {'String': ''}, 'content': 'xx'},
    {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'x' * 100_000},
    {'type': 'Prepend', 'prepend': 'x' * 100_000},
    {'type': 'Precompiled', 'precompiled_charsmap': ''},
    {'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(b'\4\0\0\0\xff\xff\xff\x7f').decode()},
    {'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(bytes(range(256)) * 8).decode()},
    *(
        {'type': t}
        for t in ('NFKC', 'Lowercase', 'StripAccents', 'Nmt', 'BertNormalizer', 'Whitespace', 'Fuse')
    ),
    *(
        {'type': t}
        for t in ('ByteLevel', 'ByteFallback', 'Digits', 'Sequence', 'Unknown', 'TemplateProcessing')
    ),
    {'type': 'Metaspace', 'replacement': '', 'prepend_scheme': 'always', 'split': True},
    {'type': 'Metaspace', 'replacement': 'x', 'prepend_scheme': 'never', 'split': True},
    {'type': 'Strip', 'content': ' ', 'start': 2**40, 'stop': 2**63},
    {'type': 'Truncate', 'direction': 'Right', 'max_length': 0, 'stride': 9, 'strategy': 'LongestFirst'},
    {'strategy': {'Fixed': 2**40}, 'direction': 'Right', 'pad_id': 0, 'pad_type_id': 0, 'pad_token': 'x'},
    *({'type': 'Sequence', key: []} for key in ('normalizers', 'pretokenizers', 'processors', 'decoders')),
]


def damaged_json(data: bytes, rng: np.random.Generator) -> bytes:
    """The text of a JSON object in which one value is another, gone, doubled, or has a name of another."""
    document = json.loads(data)
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[int(rng.integers(len(keys)))]
        below = place[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.25:
            break
        place = below
    match int(rng.integers(8)):
        case 0:
            del place[key]
        case 1:
            other = keys[int(rng.integers(len(keys)))]
            place[key], place[other] = place[other], place[key]
        case 2 if isinstance(place, dict):
            place[str(_chosen(_VALUES, rng))[:300]] = place.pop(key)
        case 2 if isinstance(place, list):
            place.append(place[key])
        case 3:
            place[key] = _chosen(_PARTS, rng)
        case 4 if isinstance(below, list):
            below.append(_chosen([*_VALUES, *_PARTS], rng))
        case 4 if isinstance(below, dict):
            below['type'] = _chosen(_PARTS, rng).get('type')
        case 4 if isinstance(below, int | float) and not isinstance(below, bool):
            place[key] = below * _chosen([-1, 2, 0.5, 10**9], rng)
        case _:
            place[key] = _chosen(_VALUES, rng)
    return json.dumps(document, ensure_ascii=bool(rng.integers(2))).encode(errors='surrogatepass')


def damaged_proto(data: bytes, rng: np.random.Generator) -> bytes:
    """A sentencepiece model in which one field of one of its messages is another, gone or doubled."""
    fields = _fields(data)
    inner = [i for i, (number, _, _) in enumerate(fields) if number != 1]
    place = int(rng.choice(inner)) if inner and rng.random() < 0.7 else int(rng.integers(len(fields)))
    number, kind, content = fields[place]
    match int(rng.integers(5)):
        case 0:
            del fields[place]
        case 1:
            fields.insert(int(rng.integers(len(fields))), fields[place])
        case _:
            message = _fields(content)
            changed = int(rng.integers(len(message))) if message else 0
            if message:
                name, kind_, _ = message[changed]
                message[changed] = name, kind_, _hostile(kind_, message[changed][2], rng)
            fields[place] = number, kind, _message(message)
    return _message(fields)


def _hostile(kind: int, content: bytes, rng: np.random.Generator) -> bytes:
    """Other content of a field of this kind of the wire."""
    if kind == 0:
        return _varint(_chosen([0, 1, 2, 3, 4, 5, 6, 7, 2**31, 2**32 - 1, 2**63, 2**64 - 1], rng))
    if kind == 5:
        return _chosen([bytes(4), b'\0\0\x80\x7f', b'\0\0\xc0\x7f', b'\xff\xff\x7f\xff'], rng)
    if len(content) > 1000 and rng.random() < 0.9:  # the compiled normalizer: its tree, or its texts
        copy = bytearray(content)
        for _ in range(int(rng.integers(1, 200))):
            copy[int(rng.integers(len(copy)))] = int(rng.integers(256))
        return bytes(copy)
    hostile = [b'', b'\xff', '▁'.encode(), b'<s>', b'\0', b'x' * 5000, content[:-1], content * 2, b'<0x41>']
    hostile += [b'\4\0\0\0\xff\xff\xff\x7f', bytes(range(256)) * 8, bytes(2048)]  # for a normalizer
    return _chosen(hostile, rng)


def _fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Number, kind and content of each field of a sound message."""
    fields, at = [], 0
    while at < len(data):
        key, at = _read_varint(data, at)
        start = at
        match key & 7:
            case 0:
                at = _read_varint(data, at)[1]
            case 5:
                at += 4
            case 2:
                length, start = _read_varint(data, at)
                at = start + length
        fields.append((key >> 3, key & 7, data[start:at]))
    return fields


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _message(fields: list[tuple[int, int, bytes]]) -> bytes:
    return b''.join(
        _varint(number << 3 | kind) + (_varint(len(content)) if kind == 2 else b'') + content
        for number, kind, content in fields
    )


def zipped(prefix: str, files: dict[str, bytes]) -> bytes:
    """An archive of uncompressed entries with the checksums of what is in it, as PyTorch lays them out."""
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        for name, data in files.items():
            archive.writestr(f'{prefix}/{name}', data)
    return out.getvalue()


def _chosen(values: list, rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]
