"""Texts as the libraries of tokenizers can take them: of Unicode, and cut where they are too long."""

import codecs
import operator
import re
from collections.abc import Iterator, Mapping, Sequence

from llama_jax.errors import InputError

_MAX_CHUNK = 400_000  # characters given to tiktoken at once: it panics on much more
_MAX_RUN = 25_000  # longest run of all-space or no-space characters: its regex engine overflows on much more
_SPACE, _NON_SPACE, _RUN = re.compile(r'\s'), re.compile(r'\S'), re.compile(r'\s+|\S+')

EACH_BYTE = (
    'llama_jax.each_byte'  # errors: every byte that is not UTF-8 becomes a U+FFFD, as in sentencepiece
)
codecs.register_error(EACH_BYTE, lambda e: ('\ufffd', e.start + 1))  # pyright: ignore


def chunks(text: str) -> Iterator[str]:
    """Cuts what is too much for tiktoken, as Meta's wrapper does; only tokens at a cut change."""
    for start in range(0, len(text), _MAX_CHUNK):
        chunk = text[start : start + _MAX_CHUNK]
        # A run over the limit covers at least one whole window of half the limit.
        windows = (chunk[i : i + _MAX_RUN // 2] for i in range(0, len(chunk) - _MAX_RUN, _MAX_RUN // 2))
        if all(_SPACE.search(window) and _NON_SPACE.search(window) for window in windows):
            yield chunk
            continue
        begin = 0
        for run in _RUN.finditer(chunk):
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


def without_surrogates(text: str) -> str:
    r"""Replaces lone surrogates (JSON can spell them, as in "\ud800") by U+FFFD: UTF-8 cannot hold them."""
    if not isinstance(text, str):
        raise InputError(f'{repr(text)[:60]} is no text to encode; give a string')
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def checked_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Ids as plain numbers; InputError where one is none of a vocabulary's."""
    try:
        ids = list(map(operator.index, ids))
    except TypeError:
        raise InputError(f'{repr(ids)[:60]} are no token ids; give a list of whole numbers') from None
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InputError(f'token id {wrong} is outside the vocabulary, 0 to {vocab_size - 1}')
    return ids


def split_at(text: str, names: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """A text in pieces: what stands between the names, with None, and the names, each with its id; the longest win."""
    if not names:
        yield text, None
        return
    found = re.compile('(' + '|'.join(map(re.escape, sorted(names, key=len, reverse=True))) + ')')
    for number, piece in enumerate(found.split(text)):
        if number % 2:
            yield piece, names[piece]
        elif piece:
            yield piece, None
