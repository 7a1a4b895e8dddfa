"""Which bytes of a sound file are values, and what a damaged text says, by other readers than the library's.

Values are weights, names and settings: any are as good as others, and a file with others is another sound file. All
else is structure, and where it is damaged no value may differ. Of a text, such as JSON, all that is said is a value:
there a damaged file must be read as what it says.
"""

import base64
import io
import json
import re
import struct
import zipfile
from typing import Any

from llama_jax.tokenizer.vocabulary import BYTES
from tests.tokenizer import kinds

Spans = list[tuple[int, int]]
Found = dict[str, Any]


# What a text says, by other readers.


def is_object(data: bytes, _: Found) -> bool:
    """All that an object says are values."""
    return isinstance(json.loads(data.decode('utf-8-sig')), dict)


def any_values(*_: Any) -> bool:
    """A description that carries a checksum, and was made anew with it."""
    return True


def says_lines(data: bytes, found: Found) -> bool:
    return [text for line in data.splitlines() if line and (text := json.loads(line)['text'])] == found[
        'texts'
    ]


def says_pieces(data: bytes, found: Found) -> bool:
    """As sentencepiece reads them, which does not tell user-defined and unused ones apart."""
    pieces = [(text, struct.pack('<f', score), kind) for text, score, kind in kinds.pieces_of(data)]
    found_ones = [
        (text, score, kind if kind not in (4, 5) else 1) for text, score, kind in found.get('pieces', [])
    ]
    return not found_ones or found_ones == pieces


def says_ranks(data: bytes, found: Found) -> bool:
    lines = [line.split() for line in data.splitlines() if line]
    ranks = [int(rank) for _, rank in lines]
    tokens = [base64.b64decode(token) for token, _ in lines]
    spelled = [text.translate(BYTES).encode('latin1') for text, *_ in found['pieces'][: len(tokens)]]
    return ranks == list(range(len(lines))) and spelled == tokens and found['vocab_size'] == len(lines) + 256


def says_llama2c_pieces(data: bytes, found: Found) -> bool:
    pieces, at = [], 4
    while at < len(data):
        score, length = struct.unpack_from('<fi', data, at)
        text = data[at + 8 : at + 8 + length].decode()
        pieces.append((text.strip() if len(pieces) < 3 else text.replace(' ', '▁'), struct.pack('<f', score)))
        at += 8 + length
    return at == len(data) and pieces == [(text, score) for text, score, _ in found['pieces']]


# Values in files of bytes.


def safetensors_values(data: bytes) -> Spans:
    """The data, and the names."""
    (length,) = struct.unpack_from('<Q', data)
    names = re.finditer(rb'"(model\.|lm_head)[^"]*"', data[: 8 + length])
    return [*((name.start() + 1, name.end() - 1) for name in names), (8 + length, len(data))]


def zip_values(data: bytes) -> Spans:
    """The content of `data/KEY`."""
    spans = []
    for entry in zipfile.ZipFile(io.BytesIO(data)).infolist():
        if re.fullmatch(r'[^/]+/data/\d+', entry.filename):
            name, extra = struct.unpack_from('<HH', data, entry.header_offset + 26)
            start = entry.header_offset + 30 + name + extra
            spans.append((start, start + entry.file_size))
    return spans


def gguf_values(data: bytes) -> Spans:
    """Keys, texts and numbers, names of tensors, and the data."""
    spans: Spans = []
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    tensors, keys = struct.unpack_from('<QQ', data, 8)
    at = 24

    def skip(size: int) -> None:
        nonlocal at
        spans.append((at, at + size))
        at += size

    def text() -> None:
        nonlocal at
        (length,) = struct.unpack_from('<Q', data, at)
        at += 8
        skip(length)

    for _ in range(keys):
        text()
        (kind,) = struct.unpack_from('<I', data, at)
        count, at = 1, at + 4
        if kind == 9:
            kind, count = struct.unpack_from('<IQ', data, at)
            at += 12
        for _ in range(count):
            text() if kind == 8 else skip(sizes[kind])
    for _ in range(tensors):
        text()
        (axes,) = struct.unpack_from('<I', data, at)
        at += 4 + 8 * axes + 12
    return [*spans, (-(-at // 32) * 32, len(data))]


def bin_values(version: int, data: bytes) -> Spans:
    """Behind the header the weights; in it the length of the context, where it takes no room."""
    start = 256 if version else 28
    return [(start, len(data)), *([(32, 36)] if version else [])]
