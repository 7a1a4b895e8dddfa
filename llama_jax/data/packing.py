"""Documents to fixed-length rows: one stream of tokens, cut every `seq_len`.

    stream   B d d d E B d d E B d d d d E          BOS document EOS, document after document
    row 0    [        T + 1        ]
    row 1                         [        T + 1        ]     shares one token with row 0

Row `i` holds tokens `i * T` to `i * T + T`, both ends included, so each token of the stream is a target once.
The first token of a document is never one: segment ids tell where documents meet, and `lm_batch` masks those
targets.
"""

import bisect
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Integer

from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import InputError, LMBatch

Row = dict[str, np.ndarray]  # 'tokens' and 'segment_ids', int32 [T + 1]
Progress = Callable[[int, int], None]  # (documents so far, bytes so far)


@runtime_checkable
class Rows(Protocol):
    """Random access to packed rows; what training reads.

    Attributes:
      seq_len: T; a row has T + 1 tokens.
      fingerprint: hash of the token stream and of where its documents begin, not of how it is cut.
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
      fingerprint: hash of tokens and starts.
    """

    tokens: Integer[np.ndarray, ' tokens']
    starts: Integer[np.ndarray, ' documents']
    num_bytes: int
    fingerprint: str

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
    """Tokenises documents into one stream in memory: 2 bytes a token, 4 where the vocabulary passes 65,536.

    Args:
      documents: texts, read once.
      tokenizer: gives the ids.
      progress: called after each batch of some 4 MB.

    Returns:
      The corpus; without tokens where there are no documents.
    """
    tokens = [np.zeros(0, token_dtype(tokenizer))]
    starts, num_tokens, num_bytes = [np.zeros(0, np.int64)], 0, 0
    fingerprint = StreamFingerprint()
    for chunk in tokenized_chunks(documents, tokenizer, progress):
        tokens.append(chunk.tokens)
        starts.append(chunk.starts + num_tokens)
        num_tokens += len(chunk.tokens)
        num_bytes += chunk.num_bytes
        fingerprint.update(tokens[-1], starts[-1])
    return TokenizedCorpus(np.concatenate(tokens), np.concatenate(starts), num_bytes, fingerprint.hexdigest())


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some whole documents of a stream; `starts` counts from the first token of the chunk."""

    tokens: Integer[np.ndarray, ' tokens']
    starts: Integer[np.ndarray, ' documents']
    num_bytes: int


def tokenized_chunks(
    documents: Iterable[str], tokenizer: Tokenizer, progress: Progress | None = None
) -> Iterator[Chunk]:
    """Tokenises a stream of documents batch by batch; memory does not grow with it."""
    dtype = token_dtype(tokenizer)
    num_documents = num_bytes = 0
    for texts in _batches(documents, max_chars=4 << 20):
        encoded = tokenizer.encode_batch(texts)
        lengths = np.array([len(ids) + 2 for ids in encoded])
        ends = np.cumsum(lengths)
        tokens = np.empty(ends[-1], dtype)
        for ids, end in zip(encoded, ends, strict=True):
            tokens[end - 1 - len(ids) : end - 1] = ids
        tokens[ends - lengths] = tokenizer.bos_id
        tokens[ends - 1] = tokenizer.eos_id
        chunk = Chunk(
            tokens, ends - lengths, sum(len(text.encode('utf-8', 'surrogatepass')) for text in texts)
        )
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


class PackedRows:
    """The rows of a corpus in memory, cut when asked for: no copy of the corpus."""

    def __init__(self, corpus: TokenizedCorpus, seq_len: int):
        """Args: corpus: at least 2 tokens. seq_len: T, at least 1. Raises InputError otherwise."""
        if seq_len < 1:
            raise InputError(f'seq_len is {seq_len}; it must be 1 or more')
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

    def __len__(self) -> int:
        return -(-(self.num_tokens - 1) // self.seq_len)

    def __getitem__(self, index: SupportsIndex) -> Row:
        """Row `index`; the last one is padded with token 0 of segment 0."""
        begin = range(len(self))[index] * self.seq_len
        first, last = np.searchsorted(self._starts, [begin, begin + self.seq_len], side='right')
        is_start = np.zeros(self.seq_len + 1, np.int32)
        is_start[self._starts[first:last] - begin] = 1  # documents that begin after the row's first token
        return pad_row(self._tokens[begin : begin + self.seq_len + 1], 1 + np.cumsum(is_start), self.seq_len)


def pad_row(tokens: Integer[np.ndarray, ' t'], segment_ids: Integer[np.ndarray, ' s'], seq_len: int) -> Row:
    """A row of `seq_len + 1` from `t` tokens and the segment ids of at least these; the rest is 0."""
    row = {name: np.zeros(seq_len + 1, np.int32) for name in ('tokens', 'segment_ids')}
    row['tokens'][: len(tokens)] = tokens
    row['segment_ids'][: len(tokens)] = segment_ids[: len(tokens)]
    return row


def lm_batch(
    tokens: Integer[np.ndarray, 'B T_plus_1'], segment_ids: Integer[np.ndarray, 'B T_plus_1']
) -> LMBatch:
    """Next-token prediction on packed rows.

    Args:
      tokens: rows of T + 1.
      segment_ids: which document of its row a token is in, from 1; 0 is padding.

    Returns:
      Batch of T. Positions restart in every piece of a document, padding included; the mask leaves out
      targets in another document and in padding.
    """
    inputs, ahead = segment_ids[:, :-1], segment_ids[:, 1:]
    index = np.arange(inputs.shape[1], dtype=np.int32)[None, :]
    begins = np.ones(inputs.shape, bool)
    begins[:, 1:] = inputs[:, 1:] != inputs[:, :-1]
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return LMBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=positions,
        segment_ids=inputs,
        loss_mask=(inputs == ahead) & (ahead != 0),
    )


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
