"""Conversations as packed rows: whole examples, as many as fit, each with what is to be learnt marked.

    row     [ question answer E | question answer E | question answer E | padding ]    T + 1 tokens
    counts    0        1      1   0        1      1   0        1      1   0

Never a piece of an example: one that is longer than a row is left out and counted, loses its oldest turns, or its end.
"""

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.lm_batch import lm_batch
from llama_jax.data.mixture import Mixture, mix
from llama_jax.data.packing import Row, best_fit
from llama_jax.data.record_kinds import Conversation
from llama_jax.data.records import read_records
from llama_jax.errors import InputError
from llama_jax.tokenizer.chat_format import ChatFormat
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import LMBatch

_log = logging.getLogger(__name__)

TOO_LONG = ('drop', 'oldest', 'cut')


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation as tokens.

    Attributes:
      tokens: with BOS; up to a stop token, but where it was cut.
      counts: which of them are to be learnt.
      record: the conversation.
    """

    tokens: Int[np.ndarray, ' n']
    counts: Bool[np.ndarray, ' n']
    record: Conversation


@dataclasses.dataclass
class Encoder:
    """Makes examples of conversations, and counts what becomes of those that are too long.

    Attributes:
      chat_format: how they are spelled.
      seq_len: T; an example has at most T + 1 tokens.
      loss_on: 'all' answers that count by their record, or the 'last' of them.
      too_long: 'drop' it; 'oldest' turns go until the rest fits, but for a system message; 'cut' its end off.
      longest: tokens of the longest that was seen, as it came.
      dropped: examples left out.
      shortened: examples that lost turns, or their end, and with it the stop token.
    """

    chat_format: ChatFormat
    seq_len: int
    loss_on: str = 'all'
    too_long: str = 'drop'
    longest: int = 0
    dropped: int = 0
    shortened: int = 0

    def __post_init__(self):
        """Raises InputError where a setting is none that there is."""
        for name, allowed in (('loss_on', ('all', 'last')), ('too_long', TOO_LONG)):
            if getattr(self, name) not in allowed:
                raise InputError(f'{name} is {getattr(self, name)!r}; it is {" or ".join(allowed)}')

    def encode(self, record: Conversation) -> Example | None:
        """The example; None where nothing to learn is left of it.

        Raises:
          InputError: the format has no such conversation.
        """
        if self.loss_on == 'last':
            last = max(number for number, count in enumerate(record.counts) if count)
            counts = tuple(number == last for number in range(len(record.counts)))
            record = dataclasses.replace(record, counts=counts)
        ids, mask = self._ids(record)
        self.longest = max(self.longest, len(ids))
        if len(ids) <= self.seq_len + 1:
            return Example(np.array(ids, np.int32), np.array(mask, bool), record)
        while self.too_long == 'oldest' and len(ids) > self.seq_len + 1:
            if not (shorter := _without_oldest(record)):
                break
            record = shorter
            ids, mask = self._ids(record)
        if self.too_long == 'cut':
            ids, mask = ids[: self.seq_len + 1], mask[: self.seq_len + 1]
        if len(ids) > self.seq_len + 1 or not any(mask):
            self.dropped += 1
            return None
        self.shortened += 1
        return Example(np.array(ids, np.int32), np.array(mask, bool), record)

    def _ids(self, record: Conversation) -> tuple[list[int], list[int]]:
        return self.chat_format.encode_dialog(record.messages, counts=record.counts)


def _without_oldest(record: Conversation) -> Conversation | None:
    """The conversation without its first question and what came of it; None where nothing to learn would be left."""
    messages, counts = record.messages, record.counts
    start = int(messages[0].role == 'system')
    for next_user in range(start + 1, len(messages)):
        if messages[next_user].role == 'user' and any(counts[next_user:]):
            kept = [*range(start), *range(next_user, len(messages))]
            return dataclasses.replace(
                record, messages=tuple(messages[i] for i in kept), counts=tuple(counts[i] for i in kept)
            )
    return None


class ExampleRows:
    """Rows of whole examples, packed by best fit; row `i` depends on the examples and `i` alone.

    Attributes:
      seq_len: T; a row has T + 1 tokens.
      examples: as given.
      num_documents: examples.
      num_tokens: of all of them.
      num_counted: tokens to be learnt.
      num_bytes: UTF-8 bytes of the answers to be learnt.
      fingerprint: hash of the examples and of how they lie.
    """

    def __init__(self, examples: Sequence[Example], seq_len: int):
        """Args: examples: at least one, none longer than `seq_len` + 1. seq_len: T."""
        self.seq_len, self.examples = seq_len, examples
        self.num_documents = len(examples)
        self.num_tokens = sum(len(example.tokens) for example in examples)
        self.num_counted = sum(int(example.counts.sum()) for example in examples)
        self.num_bytes = sum(
            len(message.content.encode('utf-8', 'surrogatepass'))
            for example in examples
            for message, count in zip(example.record.messages, example.record.counts, strict=True)
            if count
        )
        self._rows = best_fit([len(example.tokens) for example in examples], seq_len + 1)
        found = hashlib.sha256(str(seq_len).encode())
        for row in self._rows:
            for number in row:
                found.update(examples[number].tokens.tobytes() + examples[number].counts.tobytes())
            found.update(b'|')
        self.fingerprint = found.hexdigest()

    @property
    def fill(self) -> float:
        """The share of the rows' tokens that is no padding."""
        return self.num_tokens / (len(self) * (self.seq_len + 1))

    def __len__(self) -> int:
        return len(self._rows)

    def numbers(self, index: SupportsIndex) -> list[int]:
        """The examples of a row, as they stand in it."""
        return self._rows[index]

    def __getitem__(self, index: SupportsIndex) -> Row:
        """'tokens', 'segment_ids' and 'counts' of a row, [T + 1] each; its end is padding of segment 0."""
        row = {name: np.zeros(self.seq_len + 1, np.int32) for name in ('tokens', 'segment_ids')}
        row['counts'] = np.zeros(self.seq_len + 1, bool)
        start = 0
        for segment, number in enumerate(self._rows[index], start=1):
            example = self.examples[number]
            end = start + len(example.tokens)
            row['tokens'][start:end], row['counts'][start:end] = example.tokens, example.counts
            row['segment_ids'][start:end] = segment
            start = end
        return row


def collate_examples(rows: Sequence[Row]) -> LMBatch:
    """Rows as a batch in which nothing but what is to be learnt counts."""
    tokens, segment_ids, counts = (
        np.stack([row[name] for row in rows]) for name in ('tokens', 'segment_ids', 'counts')
    )
    batch = lm_batch(tokens, segment_ids)
    return batch.replace(loss_mask=batch.loss_mask & counts[:, 1:])  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass(frozen=True)
class ExampleData:
    """What supervised fine-tuning reads.

    Attributes:
      train: endless; row `i` depends on the examples, the seed and `i` only, and each pass has every example once.
      rows: of training, in order.
      validation: rows held out, or None.
      fingerprint: hash of the training rows.
    """

    train: Mixture
    rows: ExampleRows
    validation: ExampleRows | None
    fingerprint: str


def example_dataset(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    encoder: Encoder,
    *,
    validation: Sequence[str] = (),
    validation_fraction: float = 0.0,
    key_map: dict[str, str] | None = None,
    on_error: str = 'stop',
    seed: int = 0,
) -> ExampleData:
    """Reads, encodes and packs the conversations of a run.

    Args:
      sources: see `records.read_records`.
      tokenizer: of the encoder's format.
      encoder: how conversations become tokens.
      validation: sources to validate on; empty: hold conversations of `sources` out.
      validation_fraction: how many then; which ones depends on their messages alone, and the first one trains.
      key_map: see `records.read_records`.
      on_error: 'stop' at the first bad record, or 'skip' them.
      seed: of the order of rows.

    Raises:
      InputError: a source cannot be read, or nothing is left of it to learn.
    """
    if not sources:
        raise InputError('no training data: name at least one source')
    if not 0 <= validation_fraction < 1:
        raise InputError(f'validation_fraction is {validation_fraction}; it must be from 0 to below 1')
    bad = BadRecords(on_error)
    read = {
        name: list(_read_examples(given, encoder, key_map, bad))
        for name, given in (('train', sources), ('validation', validation))
    }
    train, held_out = read['train'], read['validation']
    if not validation:
        chosen = [n > 0 and is_held_out(e.record, validation_fraction) for n, e in enumerate(train)]
        held_out = list(itertools.compress(train, chosen))
        train = list(itertools.compress(train, map(lambda out: not out, chosen)))
    bad.log()
    if encoder.dropped or encoder.shortened:
        _log.warning(
            'of %d conversations %d are too long and left out, %d shortened; the longest has %d tokens, a row %d',
            len(train) + len(held_out) + encoder.dropped, encoder.dropped, encoder.shortened, encoder.longest,
            encoder.seq_len + 1,
        )  # fmt: skip
    rows = ExampleRows(train, encoder.seq_len)
    fingerprint = hashlib.sha256(f'{rows.fingerprint} {tokenizer.sha256}'.encode()).hexdigest()
    return ExampleData(
        mix([rows], None, seed),
        rows,
        ExampleRows(held_out, encoder.seq_len) if held_out else None,
        fingerprint,
    )


def _read_examples(
    sources: Iterable[str], encoder: Encoder, key_map: dict[str, str] | None, bad: BadRecords
) -> Iterator[Example]:
    for source in sources:
        before, dropped, left = bad.count, encoder.dropped, 0
        for record in read_records([source], kind=Conversation, key_map=key_map, on_error=bad):
            try:
                example = encoder.encode(record)
            except InputError as error:
                bad.add(InputError(f'{record.place}: {error}'))
                continue
            if example:
                left += 1
                yield example
        if not left:
            raise InputError(
                f'nothing to learn is left of source {source!r}: {encoder.dropped - dropped} conversations are too '
                f'long for seq_len {encoder.seq_len} (the longest has {encoder.longest} tokens), {bad.count - before} '
                'are bad; raise seq_len, or shorten them (too_long oldest or cut)'
            )


def is_held_out(record: Conversation, fraction: float) -> bool:
    """Whether a conversation is of the part that validates, which depends on what is said alone."""
    said = repr([(message.role, message.content, message.input) for message in record.messages])
    digest = hashlib.sha256(said.encode('utf-8', 'surrogatepass')).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64 < fraction
