"""Sentencepiece's compiled normalizer of characters, proved sound before a library walks through it.

Libraries believe what it says: in C++ a wrong number in it is an access beyond memory, in Rust a panic. It is a size (4
bytes), a double-array tree of so many bytes (darts-clone's, units of 4 bytes), then texts, each ended by NUL; the tree
leads from the characters of a text to where in the texts stands what replaces them.
"""

import numpy as np

from llama_jax.errors import InputError

_BLOCK = 256  # units: one for each next byte
_MAX_TEXT = 256  # bytes that one character becomes; of Unicode's own the longest are 33
_LEAF = 1 << 31


def check_charsmap(charsmap: bytes, path: str) -> None:
    """Refuses what would have a library read where nothing is, or make texts very long.

    Args:
      charsmap: of a sentencepiece model or of a tokenizer.json; empty for none.
      path: for messages.

    Raises:
      InputError: it is damaged.
    """
    if charsmap and (fault := _fault(charsmap)):
        raise InputError(f'{path}: its compiled normalizer of characters is damaged: {fault}; copy it again')


def _fault(charsmap: bytes) -> str:
    """What is wrong; '' for nothing."""
    size = int.from_bytes(charsmap[:4], 'little')
    texts = charsmap[4 + size :]
    if size % (4 * _BLOCK) or not size or not texts.endswith(b'\0'):
        return f'{len(charsmap)} bytes with a tree of {size}'
    try:
        texts.decode()
    except UnicodeDecodeError:
        return 'its texts are not UTF-8'
    units = np.frombuffer(charsmap, '<u4', size // 4, 4).astype(np.int64)
    nodes = np.flatnonzero(units < _LEAF)  # only these match a byte and are gone on from
    below = nodes ^ ((units[nodes] >> 10) << ((units[nodes] & 512) >> 6))
    if (below | _BLOCK - 1).max(initial=0) >= len(units):
        return 'its tree leads out of itself'
    places = units[below[(units[nodes] >> 8) & 1 == 1]] & _LEAF - 1
    content = np.frombuffer(texts, np.uint8)
    if places.max(initial=0) >= len(content):
        return 'its tree leads out of its texts'
    if ((content[places] & 0xC0) == 0x80).any():
        return 'its tree leads into characters'
    ends = np.flatnonzero(content == 0)
    longest = int((ends[np.searchsorted(ends, places)] - places).max(initial=0))
    return (
        f'a character becomes {longest} bytes, at most {_MAX_TEXT} are allowed' if longest > _MAX_TEXT else ''
    )
