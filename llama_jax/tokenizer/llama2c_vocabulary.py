"""llama2.c's `tokenizer.bin`: scores and pieces without types, as its C programs read them.

A number of four bytes, the longest piece, then of each piece its score, its length and its bytes, to the file's end.
Format: llama2.c's tokenizer.py, `export`, which writes spaces for sentencepiece's marks and lines around BOS and EOS.
"""

import struct

from llama_jax.errors import InputError
from llama_jax.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    MAX_TOKEN,
    NORMAL,
    UNKNOWN,
    SentencePieceModel,
    write_model,
)

_ENDS = ('<unk>', '<s>', '</s>')
_MOST = 1 << 20  # pieces


def is_llama2c(data: bytes) -> bool:
    """Whether a file begins as one: a small number, then a piece <unk>."""
    return len(data) > 17 and 0 < int.from_bytes(data[:4], 'little') <= MAX_TOKEN and data[12:17] == b'<unk>'


def model_of_llama2c(data: bytes, path: str) -> bytes:
    """The same as a sentencepiece model.

    Raises:
      InputError: the file is cut off or damaged, or its first pieces are not those of Llama.
    """
    pieces, at = [], 4
    while at < len(data):
        if len(data) - at < 8 or len(pieces) > _MOST:
            raise InputError(f'{path} is cut off or damaged after {len(pieces)} pieces; copy it again')
        score, length = struct.unpack_from('<fI', data, at)
        text = data[at + 8 : at + 8 + length]
        if length > MAX_TOKEN or len(text) < length or not abs(score) < 3.4e38:
            raise InputError(f'{path} is cut off or damaged after {len(pieces)} pieces; copy it again')
        try:
            pieces.append((text.decode(), score))
        except UnicodeDecodeError as error:
            raise InputError(f'{path}: piece {len(pieces)} is no text; copy it again') from error
        at += 8 + length
    typed = []
    for id, (text, score) in enumerate(pieces):
        if id < len(_ENDS):
            if text.strip() != _ENDS[id]:
                raise InputError(f'{path}: piece {id} is {text[:40]!r}, where a Llama has {_ENDS[id]}')
            typed.append((_ENDS[id], score, CONTROL if id else UNKNOWN))
        elif id < 259 and text == f'<0x{id - 3:02X}>':
            typed.append((text, score, BYTE))
        else:
            typed.append((text.replace(' ', '▁'), score, NORMAL))
    if len(typed) < len(_ENDS):
        raise InputError(f'{path} holds {len(typed)} pieces; a Llama has more')
    return write_model(SentencePieceModel(typed))
