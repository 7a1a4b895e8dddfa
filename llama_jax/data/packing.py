"""Documents to fixed-length rows: a stream of tokens for each unit (`units.py`), cut every `seq_len`.

    stream   B d d d E B d d E B d d d d E          BOS document EOS, document after document
    row 0    [        T + 1        ]
    row 1                         [        T + 1        ]     shares one token with row 0

Row `i` holds tokens `i * T` to `i * T + T`, both ends included, so each token of the stream is a target once.
The first token of a document is never one: segment ids tell where documents meet, and `lm_batch` masks those
targets. The last row of a unit is padded.
"""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Integer

from llama_jax.data.containers import size_of
from llama_jax.errors import InputError
from llama_jax.tokenizer.tokenizer import Tokenizer

Row = dict[str, np.ndarray]  # 'tokens' and 'segment_ids', int32 [T + 1]
Progress = Callable[[int, int], None]  # (documents so far, bytes so far)


@runtime_checkable
class Rows(Protocol):
    """Random access to packed rows; what training reads.

    Attributes:
      seq_len: T; a row has T + 1 tokens.
      fingerprint: hash of the token streams and of where their documents begin, not of how they are cut into rows.
      num_documents: documents in the stream.
      num_tokens: tokens in the stream, BOS and EOS included.
      num_bytes: UTF-8 bytes of the text.
    """

    seq_len: int
    fingerprint: str
    num_documents: int
    num_tokens: int
    num_bytes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Row: ...


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """A stream of documents, each BOS ... EOS.

    Attributes:
      tokens: the stream, uint16 or uint32.
      starts: index of each document's first token.
      num_bytes: UTF-8 bytes of the text.
      fingerprint: hash of tokens and starts, unit by unit.
      units: index of each unit's first token.
    """

    tokens: Integer[np.ndarray, ' tokens']
    starts: Integer[np.ndarray, ' documents']
    num_bytes: int
    fingerprint: str
    units: tuple[int, ...] = (0,)

    @property
    def num_documents(self) -> int:
        """Documents in the stream."""
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream, BOS and EOS included."""
        return len(self.tokens)


def tokenize_documents(
    documents: Iterable[str], tokenizer: Tokenizer, progress: Progress | None = None
) -> TokenizedCorpus:
    """Tokenises documents into one unit in memory: 2 bytes a token, 4 where the vocabulary passes 65,536.

    Args:
      documents: texts, read once.
      tokenizer: gives the ids.
      progress: called after each batch of some 4 MB.

    Returns:
      The corpus; without tokens where there are no documents.
    """
    return tokenize_units(((0, text) for text in documents), tokenizer, progress)


def tokenize_units(
    documents: Iterable[tuple[int, str]], tokenizer: Tokenizer, progress: Progress | None = None
) -> TokenizedCorpus:
    """The same of (unit, text), each unit by itself; units come one after the other."""
    tokens = [np.zeros(0, token_dtype(tokenizer))]
    starts, num_tokens, num_bytes = [np.zeros(0, np.int64)], 0, 0
    num_documents = 0
    units: list[int] = []
    hashes: list[str] = []

    def told(more_documents: int, more_bytes: int) -> None:
        if progress:
            progress(before[0] + more_documents, before[1] + more_bytes)

    for _, group in itertools.groupby(documents, key=lambda document: document[0]):
        fingerprint, first, before = StreamFingerprint(), num_tokens, (num_documents, num_bytes)
        for chunk in tokenized_chunks((text for _, text in group), tokenizer, told):
            tokens.append(chunk.tokens)
            starts.append(chunk.starts + num_tokens)
            fingerprint.update(tokens[-1], starts[-1] - first)
            num_tokens += len(chunk.tokens)
            num_documents += len(chunk.starts)
            num_bytes += chunk.num_bytes
        units.append(first)
        hashes.append(fingerprint.hexdigest())
    return TokenizedCorpus(
        np.concatenate(tokens), np.concatenate(starts), num_bytes,
        join_fingerprints(hashes or [StreamFingerprint().hexdigest()]), tuple(units) or (0,),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some whole documents of a stream; `starts` counts from the first token of the chunk."""

    tokens: Integer[np.ndarray, ' tokens']
    starts: Integer[np.ndarray, ' documents']
    num_bytes: int


def tokenized_chunks(
    documents: Iterable[str], tokenizer: Tokenizer, progress: Progress | None = None, num_threads: int = 0
) -> Iterator[Chunk]:
    """Tokenises a stream of documents batch by batch, in so many threads (0: all cores); memory stays as it is."""
    dtype = token_dtype(tokenizer)
    num_documents = num_bytes = 0
    for texts in _batches(documents, max_chars=4 << 20):
        encoded = tokenizer.encode_batch(texts, num_threads) if num_threads else tokenizer.encode_batch(texts)
        lengths = np.array([len(ids) + 2 for ids in encoded])
        ends = np.cumsum(lengths)
        tokens = np.empty(ends[-1], dtype)
        for ids, end in zip(encoded, ends, strict=True):
            tokens[end - 1 - len(ids) : end - 1] = ids
        tokens[ends - lengths] = tokenizer.bos_id
        tokens[ends - 1] = tokenizer.eos_id
        chunk = Chunk(tokens, ends - lengths, sum(size_of(text) for text in texts))
        num_documents += len(texts)
        num_bytes += chunk.num_bytes
        if progress:
            progress(num_documents, num_bytes)
        yield chunk


def _batches(documents: Iterable[str], max_chars: int) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= max_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Smallest of uint16 and uint32 that holds every id."""
    return np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')


class StreamFingerprint:
    """Hash of a token stream that does not depend on the pieces it arrives in."""

    def __init__(self):
        self._tokens, self._starts = hashlib.sha256(), hashlib.sha256()

    def update(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Adds the next tokens, and the indices in the whole stream where documents begin among them."""
        self._tokens.update(tokens.tobytes())
        self._starts.update(starts.astype('<i8').tobytes())

    def hexdigest(self) -> str:
        """The hash so far."""
        return hashlib.sha256(self._tokens.digest() + self._starts.digest()).hexdigest()


def join_fingerprints(units: Sequence[str]) -> str:
    """The fingerprint of a source from those of its units; of a single one its own."""
    return units[0] if len(units) == 1 else hashlib.sha256('\n'.join(units).encode()).hexdigest()


def count_rows(num_tokens: int, seq_len: int) -> int:
    """Rows of a unit of so many tokens."""
    return -(-(num_tokens - 1) // seq_len)


class RowStream:
    """The rows of one unit, made as its tokens come.

    Attributes:
      fingerprint: of what has come.
      num_tokens: that have come; so for documents and bytes.
    """

    def __init__(self, dtype: np.dtype, seq_len: int):
        self.fingerprint = StreamFingerprint()
        self.num_tokens = self.num_documents = self.num_bytes = 0
        self._seq_len = seq_len
        self._tokens = np.zeros(0, dtype)  # not yet in a row, or shared with the next one
        self._numbers = np.zeros(0, np.int64)  # of the documents that they belong to

    def add(self, chunk: Chunk) -> Iterator[Row]:
        """Rows that are complete with the next documents."""
        self.fingerprint.update(chunk.tokens, chunk.starts + self.num_tokens)
        is_start = np.zeros(len(chunk.tokens), np.int64)
        is_start[chunk.starts] = 1
        self._tokens = np.concatenate([self._tokens, chunk.tokens])
        self._numbers = np.concatenate([self._numbers, self.num_documents + np.cumsum(is_start)])
        self.num_documents += len(chunk.starts)
        self.num_tokens += len(chunk.tokens)
        self.num_bytes += chunk.num_bytes
        begin = 0
        while begin + self._seq_len < len(self._tokens):
            row = slice(begin, begin + self._seq_len + 1)
            segment_ids = 1 + self._numbers[row] - self._numbers[begin]
            yield pad_row(self._tokens[row], segment_ids, self._seq_len)
            begin += self._seq_len
        self._tokens, self._numbers = self._tokens[begin:], self._numbers[begin:]

    def end(self) -> Iterator[Row]:
        """The last row, padded, where something is left for it."""
        if len(self._tokens) > 1:
            yield pad_row(self._tokens, 1 + self._numbers - self._numbers[0], self._seq_len)


MAX_SEQ_LEN = 1 << 24  # no model reads a longer row


def check_seq_len(seq_len: int) -> None:
    """Refuses a length that no row has.

    Raises:
      InputError: says so.
    """
    if not 1 <= seq_len <= MAX_SEQ_LEN:
        raise InputError(f'seq_len is {seq_len}; it must be from 1 to {MAX_SEQ_LEN}')


class PackedRows:
    """The rows of a corpus in memory, cut when asked for: no copy of the corpus."""

    def __init__(self, corpus: TokenizedCorpus, seq_len: int):
        """Args: corpus: at least 2 tokens. seq_len: T, at least 1. Raises InputError otherwise."""
        check_seq_len(seq_len)
        if corpus.num_tokens < 2:
            raise InputError(
                f'the corpus has {corpus.num_tokens} tokens; 2 are the least to train on: give more text'
            )
        self.seq_len = seq_len
        self.fingerprint = corpus.fingerprint
        self.num_documents = corpus.num_documents
        self.num_tokens = corpus.num_tokens
        self.num_bytes = corpus.num_bytes
        self._tokens, self._starts = corpus.tokens, corpus.starts
        self._units = [*corpus.units, corpus.num_tokens]
        lengths = (end - begin for begin, end in itertools.pairwise(self._units))
        self._ends = list(itertools.accumulate(count_rows(length, seq_len) for length in lengths))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Row:
        """Row `index`; the last one of a unit is padded with token 0 of segment 0."""
        number = range(len(self))[index]
        unit = bisect.bisect_right(self._ends, number)
        row_of_unit = number - (self._ends[unit - 1] if unit else 0)
        begin = self._units[unit] + row_of_unit * self.seq_len
        end = min(begin + self.seq_len + 1, self._units[unit + 1])
        first, last = np.searchsorted(self._starts, [begin, begin + self.seq_len], side='right')
        is_start = np.zeros(self.seq_len + 1, np.int32)
        is_start[self._starts[first:last] - begin] = 1  # documents that begin after the row's first token
        return pad_row(self._tokens[begin:end], 1 + np.cumsum(is_start), self.seq_len)


class JoinedRows:
    """Rows of several sources, one after the other."""

    def __init__(self, parts: Sequence[Rows]):
        """Args: parts: of one length."""
        self.seq_len = parts[0].seq_len
        self.fingerprint = join_fingerprints([part.fingerprint for part in parts])
        self.num_documents = sum(part.num_documents for part in parts)
        self.num_tokens = sum(part.num_tokens for part in parts)
        self.num_bytes = sum(part.num_bytes for part in parts)
        self._parts, self._ends = parts, list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Row:
        number = range(len(self))[index]
        part = bisect.bisect_right(self._ends, number)
        return self._parts[part][number - (self._ends[part - 1] if part else 0)]


def pad_row(tokens: Integer[np.ndarray, ' t'], segment_ids: Integer[np.ndarray, ' s'], seq_len: int) -> Row:
    """A row of `seq_len + 1` from `t` tokens and the segment ids of at least these; the rest is 0."""
    row = {name: np.zeros(seq_len + 1, np.int32) for name in ('tokens', 'segment_ids')}
    row['tokens'][: len(tokens)] = tokens
    row['segment_ids'][: len(tokens)] = segment_ids[: len(tokens)]
    return row


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of what stands together in a bin: the longest first, each where it leaves least room.

    Args:
      lengths: none above the capacity.
      capacity: of a bin.
    """
    rooms: list[tuple[int, int]] = []  # (what a bin has left, its number), in order
    bins: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(rooms, (lengths[number], -1))
        room, index = rooms.pop(place) if place < len(rooms) else (capacity, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(number)
        if left := room - lengths[number]:
            bisect.insort(rooms, (left, index))
    return bins
