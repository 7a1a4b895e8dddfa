"""Pairs of answers as packed rows: whole pairs in a row, each answer behind its prompt in a segment of its own.

    apart     [prompt chosen] [prompt rejected] | [prompt chosen] [prompt rejected] | padding
    shared    [prompt) (answer] (answer] (answer] | [prompt) (answer] (answer]      | padding

Shared, the prompt of several answers stands once; each answer begins with the prompt's last token, whose target is its
first, and sees its prompt (`ops.attention_shared_prefix`), with positions that go on from there. What is counted, what
is compared and where it is scored is made together with the ids; nothing is found out from the rows later.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int

from llama_jax.data.packing import Row, best_fit
from llama_jax.errors import InputError
from llama_jax.ops.attention_shared_prefix import SHARED, segment_of
from llama_jax.tokenizer.chat_format import ChatFormat, Message
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import PreferenceBatch


@dataclasses.dataclass(frozen=True)
class Answer:
    """What stands behind a prompt.

    Attributes:
      tokens: up to its stop token.
      counts: which of them are the assistant's words, or end them.
      safe: 1 or 0 where that was judged, else -1.
    """

    tokens: Int[np.ndarray, ' n']
    counts: Bool[np.ndarray, ' n']
    safe: int = -1

    @property
    def key(self) -> bytes:
        """The same for the same tokens."""
        return self.tokens.tobytes()


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """Two answers to a prompt, or one that was judged alone.

    Attributes:
      prompt: tokens, at least one.
      answers: the better one and the other; None where there is none.
      margin: by how much it is better, in the data's unit; 0 where that is not said.
    """

    prompt: Int[np.ndarray, ' p']
    answers: tuple[Answer | None, Answer | None]
    margin: float = 0.0


def mismatched(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Each prompt with the answer to another one: that of the next answer whose prompt is not the same.

    Args:
      pairs: each of one answer, that was judged alone.

    Raises:
      InputError: all have the same prompt.
    """
    texts = [pair.prompt.tobytes() for pair in pairs]
    if len(set(texts)) < 2:
        raise InputError(
            'all answers are to the same prompt; they are compared with answers to other prompts: give at least two'
        )
    number, follower = len(pairs), 0
    next_other = [0] * number
    for i in reversed(range(2 * number)):  # twice around: the last ones look on to the first
        if texts[i % number] != texts[(i + 1) % number]:
            follower = (i + 1) % number
        next_other[i % number] = follower
    return [
        EncodedPair(pair.prompt, pairs[other].answers) for pair, other in zip(pairs, next_other, strict=True)
    ]


def encode_answer(
    chat_format: ChatFormat, prompt: Sequence[Message], answer: Sequence[Message], safe: int = -1
) -> tuple[Int[np.ndarray, ' p'], Answer]:
    """A prompt's tokens, and those that an answer adds to them.

    Raises:
      InputError: the messages are in no order that the format has, or the answer has no words.
    """
    if not any(message.content.strip() for message in answer if message.role == 'assistant'):
        raise InputError('the answer is empty; give one, or leave the record out')
    prompt_ids = chat_format.encode_prompt(prompt)
    ids, counts = chat_format.encode_dialog([*prompt, *answer])
    assert ids[: len(prompt_ids)] == prompt_ids, 'a prompt begins its conversation'
    tokens, counted = (np.array(values[len(prompt_ids) :]) for values in (ids, counts))
    return np.array(prompt_ids, np.int32), Answer(tokens.astype(np.int32), counted.astype(bool), safe)


def format_ids(tokenizer: Tokenizer, chat_format: ChatFormat) -> tuple[int, ...]:
    """Ids that are form and not words: those that end a message, and what stands for no text."""
    special = getattr(tokenizer, 'special_tokens', {})
    return tuple(sorted({*chat_format.stop_ids, *special.values()}))


@dataclasses.dataclass
class _Unit:
    """Answers that stand in one row, each behind `prompt`, with the pairs that compare them."""

    prompt: np.ndarray
    answers: list[Answer]
    pairs: list[tuple[int, Sequence[int | None]]]  # (number of the pair, places of its two answers)


class PreferenceRows:
    """Rows of whole pairs, packed by best fit; row `i` depends on the pairs and `i` alone.

    Attributes:
      seq_len: T.
      pairs: as given.
      num_pairs: the most that a row holds.
      too_long: numbers of the pairs that no row holds, which are left out.
      num_tokens: of all rows, without padding.
      fingerprint: hash of the pairs and of how they lie.
    """

    def __init__(
        self,
        pairs: Iterable[EncodedPair],
        seq_len: int,
        *,
        format_ids: Sequence[int] = (),
        share_prompt: bool = False,
        reference: np.ndarray | None = None,
    ):
        """Packs the pairs.

        Args:
          pairs: see `EncodedPair`.
          seq_len: T, at least 1.
          format_ids: tokens that are form and not words.
          share_prompt: pairs with the same prompt stand together, it and each of their answers once.
          reference: log-probabilities of both answers of each pair under a reference, [pairs, 2].

        Raises:
          InputError: there is no pair, or none that a row holds.
        """
        self.seq_len, self.pairs, self._shared = seq_len, tuple(pairs), share_prompt
        self.reference, self._format_ids = reference, np.array(sorted(format_ids), np.int32)
        units = list(_shared_units(self.pairs) if share_prompt else _single_units(self.pairs))
        lengths = [self._length(unit) for unit in units]
        self.too_long = [
            n for u, size in zip(units, lengths, strict=True) if size > seq_len for n, _ in u.pairs
        ]
        if len(self.too_long) == len(self.pairs):
            raise InputError(
                f'of {len(self.pairs)} pairs none fits into a row of {seq_len} tokens: the longest takes '
                f'{max(lengths, default=0)}; take longer rows'
            )
        fitting = [(unit, size) for unit, size in zip(units, lengths, strict=True) if size <= seq_len]
        self._rows = [
            [fitting[i][0] for i in row] for row in best_fit([size for _, size in fitting], seq_len)
        ]
        self.num_pairs = max(sum(len(unit.pairs) for unit in row) for row in self._rows)
        self.num_tokens = sum(size for _, size in fitting)
        self.num_documents = len(self.pairs) - len(self.too_long)
        self.fingerprint = self._hash()

    def __len__(self) -> int:
        return len(self._rows)

    def numbers(self, index: SupportsIndex) -> list[int]:
        """The pairs of a row, as they stand in its arrays."""
        return [number for unit in self._rows[index] for number, _ in unit.pairs]

    def __getitem__(self, index: SupportsIndex) -> Row:
        """The arrays of one row of a `PreferenceBatch`, by name."""
        T, P = self.seq_len, self.num_pairs
        row: dict[str, Any] = {
            name: np.zeros(T, np.int32) for name in ('tokens', 'targets', 'positions', 'segment_ids')
        }
        row |= {'loss_mask': np.zeros(T, bool)}
        row |= {name: np.zeros((P, 2), np.int32) for name in ('pairs', 'ends')}
        row |= {name: np.zeros(P, np.float32) for name in ('margins', 'weights')}
        row |= {'safe': np.full((P, 2), -1, np.int32), 'reference': np.zeros((P, 2), np.float32)}
        slot = pair = 0
        for group, unit in enumerate(self._rows[index]):
            if self._shared:  # but for its last token, with which each answer begins
                slot = _write(row, slot, unit.prompt[:-1], 0, SHARED - group)
            place_of = {}
            for number, answer in enumerate(unit.answers):
                own = unit.prompt[-1:] if self._shared else unit.prompt
                segment = segment_of(group, 1 + number)
                start, tokens = slot, np.concatenate([own, answer.tokens])
                slot = _write(row, start, tokens, len(unit.prompt) - len(own), segment)
                first = start + len(own) - 1  # whose target is the answer's first token
                row['loss_mask'][first : slot - 1] = answer.counts
                place_of[number] = segment, slot - 1
            for number, places in unit.pairs:
                for side, place in enumerate(places):
                    if place is not None:
                        row['pairs'][pair, side], row['ends'][pair, side] = place_of[place]
                        row['safe'][pair, side] = unit.answers[place].safe
                row['margins'][pair], row['weights'][pair] = self.pairs[number].margin, 1.0
                if self.reference is not None:
                    row['reference'][pair] = self.reference[number]
                pair += 1
        row['format_mask'] = row['loss_mask'] & np.isin(row['targets'], self._format_ids)
        row['baseline'] = np.zeros((), np.float32)
        return row

    def _length(self, unit: _Unit) -> int:
        answers = sum(len(answer.tokens) for answer in unit.answers)
        if self._shared:
            return len(unit.prompt) - 1 + len(unit.answers) + answers
        return len(unit.prompt) * len(unit.answers) + answers

    def _hash(self) -> str:
        found = hashlib.sha256(repr((self.seq_len, self._shared, self._format_ids.tolist())).encode())
        for row in self._rows:
            for unit in row:
                found.update(unit.prompt.tobytes())
                for answer in unit.answers:
                    found.update(answer.key + answer.counts.tobytes() + bytes([answer.safe + 1]))
                found.update(repr([(*pair, self.pairs[pair[0]].margin) for pair in unit.pairs]).encode())
            found.update(b'|')
        return found.hexdigest()


def collate_preferences(rows: Sequence[Row]) -> PreferenceBatch:
    """Rows as a batch."""
    return PreferenceBatch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def _write(row: dict[str, Any], slot: int, tokens: np.ndarray, position: int, segment: int) -> int:
    """Writes a sequence into a row from a slot on; returns the slot after it."""
    end = slot + len(tokens)
    row['tokens'][slot:end] = tokens
    row['targets'][slot : slot + len(tokens[1:])] = tokens[1:]
    row['positions'][slot:end] = np.arange(position, position + len(tokens))
    row['segment_ids'][slot:end] = segment
    return end


def _single_units(pairs: Sequence[EncodedPair]) -> Iterator[_Unit]:
    for number, pair in enumerate(pairs):
        answers = [answer for answer in pair.answers if answer is not None]
        places = iter(range(2))
        yield _Unit(
            pair.prompt, answers, [(number, [None if a is None else next(places) for a in pair.answers])]
        )


def _shared_units(pairs: Sequence[EncodedPair]) -> Iterator[_Unit]:
    """Pairs by prompt; the answers in an order that tells nothing, that of a hash of them."""
    by_prompt: dict[bytes, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt.tobytes(), []).append(number)
    for numbers in by_prompt.values():
        found = {answer.key: answer for n in numbers for answer in pairs[n].answers if answer is not None}
        order = sorted(found, key=lambda key: hashlib.sha256(key).digest())
        place = {key: index for index, key in enumerate(order)}
        compared: list[tuple[int, Sequence[int | None]]] = [
            (n, [None if answer is None else place[answer.key] for answer in pairs[n].answers])
            for n in numbers
        ]
        yield _Unit(pairs[numbers[0]].prompt, [found[key] for key in order], compared)
