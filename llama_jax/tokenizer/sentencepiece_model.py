"""The contents of a sentencepiece model, read and written: a protocol buffer of three messages.

By hand, for it is twenty lines, and sentencepiece's own Python module for it demands the newest protobuf.
Field numbers: sentencepiece/src/sentencepiece_model.proto.
"""

import dataclasses
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from llama_jax.types import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces, and of GGUF's tokens
_BPE = 2  # TrainerSpec.ModelType


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """What decides the ids of a text.

    Attributes:
      pieces: text, score and type of each id.
      bos_piece: begins a document.
      eos_piece: ends it.
      add_dummy_prefix: whether a text is read as if a space came before it.
      remove_extra_whitespaces: whether outer spaces go and inner ones are squeezed.
    """

    pieces: list[tuple[str, float, int]]
    bos_piece: str = '<s>'
    eos_piece: str = '</s>'
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False


def read_model(data: bytes, path: str) -> SentencePieceModel:
    """Reads a model that sentencepiece itself has opened.

    Raises:
      InputError: it is no BPE, or changes texts before it splits them, which no other format of Llama's can say.
    """
    pieces, trainer, normalizer = [], {}, {}
    for number, message in _fields(data):
        if number == 1:
            piece = dict(_fields(message))
            (score,) = struct.unpack('<f', piece.get(2, bytes(4)))
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(message))
        elif number == 3:
            normalizer = dict(_fields(message))
    refused = {
        'is not BPE': trainer.get(3, 1) != _BPE,
        'puts spaces after words': trainer.get(24, 0),
        f'normalizes texts ({normalizer.get(1, b"").decode()})': normalizer.get(2, b''),
        'leaves spaces as they are': not normalizer.get(5, 1),
    }
    for what, is_so in refused.items():
        if is_so:
            raise InputError(f"{path} {what}; of sentencepiece models only those like Llama 2's convert")
    return SentencePieceModel(
        pieces,
        trainer.get(46, b'<s>').decode(),
        trainer.get(47, b'</s>').decode(),
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def write_model(model: SentencePieceModel) -> bytes:
    """The file that sentencepiece opens, with the settings of Llama 2's own."""
    text_of_type = {kind: text for text, _, kind in reversed(model.pieces)}
    index = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    trainer = {
        3: _BPE, 4: len(model.pieces), 22: 1, 23: 1, 25: 1, 26: 1, 35: BYTE in text_of_type,
        40: index.get(text_of_type.get(UNKNOWN, ''), 0), 41: index[model.bos_piece], 42: index[model.eos_piece],
        43: (1 << 64) - 1,  # no padding: -1
        44: ' \u2047 ', 45: text_of_type.get(UNKNOWN, '<unk>'), 46: model.bos_piece, 47: model.eos_piece,
    }  # fmt: skip
    normalizer = {
        1: 'identity', 2: '', 3: model.add_dummy_prefix, 4: model.remove_extra_whitespaces, 5: 1,
    }  # fmt: skip
    pieces = [(1, _message([(1, text), (2, score), (3, kind)])) for text, score, kind in model.pieces]
    return _message([*pieces, (2, _message(trainer.items())), (3, _message(normalizer.items()))])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int, or bytes."""
    at = 0
    while at < len(message):
        key, at = message[at], at + 1
        if key > 127:  # fields from 16 on
            key, at = key & 127 | message[at] << 7, at + 1
        number = {1: 8, 5: 4}.get(key & 7, 0)
        if not number:
            shift, byte = 0, 128
            while byte > 127:  # seven bits a byte, the lowest first
                byte, at = message[at], at + 1
                number |= (byte & 127) << shift
                shift += 7
        if key & 7 == 0:
            yield key >> 3, number
        else:
            yield key >> 3, message[at : at + number]
            at += number


def _message(fields: Iterable[tuple[int, int | float | str | bytes]]) -> bytes:
    """Fields as bytes, in the order given."""
    message = bytearray()
    for field, value in fields:
        content = value.encode() if isinstance(value, str) else value
        if isinstance(content, float):
            message += bytes([field << 3 | 5]) + struct.pack('<f', content)
            continue
        numbers = [field << 3, content] if isinstance(content, int) else [field << 3 | 2, len(content)]
        for number in numbers:
            while number > 127:
                message.append(number & 127 | 128)
                number >>= 7
            message.append(number)
        if isinstance(content, bytes):
            message += content
    return bytes(message)
