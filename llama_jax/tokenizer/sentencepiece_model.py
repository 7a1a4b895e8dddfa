"""The contents of a sentencepiece model, read and written: a protocol buffer of three messages.

By hand, for it is twenty lines, and sentencepiece's own Python module for it demands the newest protobuf.
Field numbers: sentencepiece/src/sentencepiece_model.proto.
"""

import dataclasses
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from llama_jax.errors import InputError, error_line
from llama_jax.tokenizer.charsmap import check_charsmap

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces, and of GGUF's tokens
MAX_TOKEN = 1024  # bytes of a token's text, in any format; Llama 3's longest has 128
_NONE = (1 << 64) - 1  # -1: there is no such token
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """What decides the ids of a text, and the text of ids.

    Attributes:
      pieces: text, score and type of each id.
      bos_piece: begins a document.
      eos_piece: ends it.
      add_dummy_prefix: whether a text is read as if a space came before it.
      remove_extra_whitespaces: whether outer spaces go and inner ones are squeezed.
      is_unigram: whether scores are of words by themselves, else of merges.
      charsmap: the compiled normalizer of characters; empty for none.
      rewrites: whether a text of ids is rewritten as a whole.
    """

    pieces: list[tuple[str, float, int]]
    bos_piece: str = '<s>'
    eos_piece: str = '</s>'
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    is_unigram: bool = False
    charsmap: bytes = b''
    rewrites: bool = False


def checked_model(data: bytes, path: str) -> SentencePieceModel:
    """What a file says; refuses what sentencepiece fails at only later, or believes to its end.

    Raises:
      InputError: the file is damaged, or none.
    """
    model = _parse(data, path).model
    check_charsmap(model.charsmap, path)
    pieces = model.pieces
    if not pieces:
        raise _none(data, path)
    types = [kind for _, _, kind in pieces]
    if wrong := set(types) - set(range(NORMAL, BYTE + 1)):
        raise InputError(f'{path} has a piece of type {min(wrong)}; the types are {NORMAL} to {BYTE}')
    if types.count(UNKNOWN) != 1:
        raise InputError(f'{path} has {types.count(UNKNOWN)} pieces for what is unknown; it needs one')
    return model


def read_model(data: bytes, path: str) -> SentencePieceModel:
    """Reads a model that sentencepiece itself has opened.

    Raises:
      InputError: it is damaged, neither BPE nor Unigram, or treats spaces as no other format of Llama's can say.
    """
    parsed = _parse(data, path)
    refused = {
        'is neither BPE nor Unigram': parsed.kind not in (_BPE, _UNIGRAM),
        'puts spaces after words': parsed.puts_spaces_after,
        'leaves spaces as they are': not parsed.escapes_spaces,
    }
    for what, is_so in refused.items():
        if is_so:
            raise InputError(f"{path} {what}; of sentencepiece models only those like Llama 2's convert")
    return parsed.model


@dataclasses.dataclass(frozen=True)
class _Parsed:
    """A model, and what else is known of it."""

    model: SentencePieceModel
    kind: int
    puts_spaces_after: bool
    escapes_spaces: bool


def _parse(data: bytes, path: str) -> _Parsed:
    pieces, trainer, normalizer, denormalizer = [], {}, {}, {}
    try:
        for number, message in _fields(data):
            if number == 1:
                piece = dict(_fields(message))
                (score,) = struct.unpack('<f', piece.get(2, bytes(4)))
                if len(piece[1]) > MAX_TOKEN:
                    raise ValueError(f'a piece of {len(piece[1])} bytes; at most {MAX_TOKEN} are read')
                pieces.append((piece[1].decode(), score, int(piece.get(3, NORMAL))))
            elif number == 2:
                trainer |= dict(_fields(message))
            elif number == 3:
                normalizer |= dict(_fields(message))
            elif number == 5:
                denormalizer |= dict(_fields(message))
        model = SentencePieceModel(
            pieces,
            trainer.get(46, b'<s>').decode(),
            trainer.get(47, b'</s>').decode(),
            bool(normalizer.get(3, 1)),
            bool(normalizer.get(4, 1)),
            trainer.get(3, 1) == _UNIGRAM,
            bytes(normalizer.get(2, b'')),
            rewrites=bool(denormalizer.get(2)),
        )
        return _Parsed(
            model,
            kind=trainer.get(3, 1),
            puts_spaces_after=bool(trainer.get(24, 0)),
            escapes_spaces=bool(normalizer.get(5, 1)),
        )
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        if not pieces:
            raise _none(data, path) from error
        raise InputError(
            f'{path} is a damaged sentencepiece model, after {len(pieces)} pieces: {error_line(error)}; copy it again'
        ) from error


def _none(data: bytes, path: str) -> InputError:
    return InputError(
        f'{path} is not a tokenizer: neither a sentencepiece model nor a tiktoken rank file nor a tokenizer.json '
        f'({len(data)} bytes); give the tokenizer.model that came with the weights'
    )


def write_model(model: SentencePieceModel) -> bytes:
    """The file that sentencepiece opens, with the settings of Llama 2's own."""
    text_of_type = {kind: text for text, _, kind in reversed(model.pieces)}
    index = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    trainer = {
        3: _UNIGRAM if model.is_unigram else _BPE, 4: len(model.pieces), 22: 1, 23: 1, 25: 1, 26: 1,
        35: BYTE in text_of_type, 40: index.get(text_of_type.get(UNKNOWN, ''), 0),
        41: index.get(model.bos_piece, _NONE), 42: index.get(model.eos_piece, _NONE),
        43: _NONE,
        44: ' \u2047 ', 45: text_of_type.get(UNKNOWN, '<unk>'), 46: model.bos_piece, 47: model.eos_piece,
    }  # fmt: skip
    normalizer = {
        1: 'custom' if model.charsmap else 'identity', 2: model.charsmap,
        3: model.add_dummy_prefix, 4: model.remove_extra_whitespaces, 5: 1,
    }  # fmt: skip
    pieces = [(1, _message([(1, text), (2, score), (3, kind)])) for text, score, kind in model.pieces]
    return _message([*pieces, (2, _message(trainer.items())), (3, _message(normalizer.items()))])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        if kind == 2:
            length, at = _varint(message, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f'a field of kind {kind}')
        if length > len(message) - at:
            raise ValueError('a field beyond its end')
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise ValueError('a number of more than ten bytes')


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
