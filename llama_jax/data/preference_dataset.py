"""From files of pairs to what a reward model or a policy is trained on: endless mixed rows, and rows to validate on."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.mixture import Mixture, mix
from llama_jax.data.preferences import (
    EncodedPair,
    PreferenceRows,
    encode_answer,
    format_ids,
    mismatched,
)
from llama_jax.data.record_kinds import Judged, Messages, Preference
from llama_jax.data.records import read_records
from llama_jax.errors import InputError
from llama_jax.tokenizer.chat_format import ChatFormat
from llama_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreferenceData:
    """What training on preferences reads.

    Attributes:
      train: endless; row `i` depends on the sources, the weights, the seed and `i` only.
      train_rows: the rows of each training source.
      validation: rows in order, or None where nothing was given or held out.
      fingerprint: hash of the training rows, their weights and the tokenizer; not of the seed.
      others: of answers that were judged alone, the same prompts with answers to others (`preferences.mismatched`):
        those of the training rows, mixed as these are, those of each source, and those to validate with.
    """

    train: Mixture
    train_rows: tuple[PreferenceRows, ...]
    validation: PreferenceRows | None
    fingerprint: str
    others: 'PreferenceData | None' = None

    @property
    def says_what_is_safe(self) -> bool:
        """Whether any answer to train on is known to be safe, or not."""
        answers = (answer for rows in self.train_rows for pair in rows.pairs for answer in pair.answers)
        return any(answer is not None and answer.safe >= 0 for answer in answers)

    @property
    def says_by_how_much(self) -> bool:
        """Whether of any pair to train on the one answer is better by a margin above 0."""
        return any(pair.margin for rows in self.train_rows for pair in rows.pairs)

    @property
    def num_rows(self) -> int:
        """Of all training sources."""
        return sum(map(len, self.train_rows))

    @property
    def num_pairs(self) -> int:
        """The most that a row of any source holds."""
        return max(rows.num_pairs for rows in self.train_rows)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records become rows.

    Attributes:
      tokenizer: gives the ids.
      chat_format: how a conversation is spelled.
      seq_len: T.
      key_map: see `read_records`.
      on_error: 'stop' at a record that is of no use, or 'skip' it.
      too_long: 'drop' a pair that no row holds, or its prompt loses its 'oldest' turns, but for a system message.
      share_prompt: see `PreferenceRows`.
      judged: records are answers that were judged alone, not pairs.
    """

    tokenizer: Tokenizer
    chat_format: ChatFormat
    seq_len: int
    key_map: Mapping[str, str] = dataclasses.field(default_factory=dict)
    on_error: str = 'stop'
    too_long: str = 'drop'
    share_prompt: bool = False
    judged: bool = False

    def __post_init__(self):
        """Raises InputError where a setting is none that there is."""
        if self.too_long not in ('drop', 'oldest'):
            raise InputError(
                f'too_long is {self.too_long!r}; of pairs it is drop or oldest, as no answer may lose its end'
            )

    def pairs(self, sources: Sequence[str]) -> list[EncodedPair]:
        """The encoded pairs of some sources, in order.

        Raises:
          InputError: a source or a record cannot be read; it is named.
        """
        bad = BadRecords(self.on_error)
        found = list(self._encoded(sources, bad))
        bad.log()
        return found

    def rows(self, pairs: Sequence[EncodedPair], origin: str) -> PreferenceRows:
        """Pairs as rows; those that no row holds are counted in a warning.

        Raises:
          InputError: there is no pair, or none that a row holds.
        """
        ids = format_ids(self.tokenizer, self.chat_format)
        try:
            rows = PreferenceRows(pairs, self.seq_len, format_ids=ids, share_prompt=self.share_prompt)
        except InputError as error:
            raise InputError(f'{origin}: {error}') from None
        if rows.too_long:
            _log.warning(
                '%s: left out %d of %d pairs, which no row of %d tokens holds', origin, len(rows.too_long), len(pairs),
                self.seq_len,
            )  # fmt: skip
        return rows

    def other_answers(self, pairs: Sequence[EncodedPair], origin: str) -> PreferenceRows:
        """Rows of the same prompts with answers to others; those that no row holds are left out.

        Raises:
          InputError: there is one prompt alone.
        """
        try:
            return PreferenceRows(
                mismatched(pairs), self.seq_len, format_ids=format_ids(self.tokenizer, self.chat_format),
                share_prompt=self.share_prompt,
            )  # fmt: skip
        except InputError as error:
            raise InputError(f'{origin}: {error}') from None

    def _encoded(self, sources: Sequence[str], bad: BadRecords) -> Iterator[EncodedPair]:
        kind: Any = Judged if self.judged else Preference
        for record in read_records(sources, kind=kind, key_map=self.key_map, on_error=bad):
            try:
                pair = self._encode(record)
            except InputError as error:
                bad.add(InputError(f'{record.place}: {error}'))
                continue
            yield pair

    def _encode(self, record: Preference | Judged) -> EncodedPair:
        pair = self._encode_pair(record)
        while self.too_long == 'oldest' and self._length(pair) > self.seq_len:
            if (shorter := _without_oldest(record.prompt)) is None:
                break
            record = dataclasses.replace(record, prompt=shorter)
            pair = self._encode_pair(record)
        return pair

    def _length(self, pair: EncodedPair) -> int:
        answers = [len(answer.tokens) for answer in pair.answers if answer]
        prompts = (
            len(pair.prompt) - 1 + len(answers) if self.share_prompt else len(answers) * len(pair.prompt)
        )
        return sum(answers) + prompts

    def _encode_pair(self, record: Preference | Judged) -> EncodedPair:
        if isinstance(record, Judged):
            prompt, answer = encode_answer(self.chat_format, record.prompt, record.completion)
            return EncodedPair(prompt, (answer, None) if record.label else (None, answer))
        safe = [-1 if one is None else int(one) for one in record.safe]
        prompt, chosen = encode_answer(self.chat_format, record.prompt, record.chosen, safe[0])
        _, rejected = encode_answer(self.chat_format, record.prompt, record.rejected, safe[1])
        if chosen.key == rejected.key:
            raise InputError('chosen and rejected have the same tokens')
        return EncodedPair(prompt, (chosen, rejected), record.margin or 0.0)


def preference_dataset(
    reading: Reading,
    train: Sequence[str],
    *,
    weights: Sequence[float | int] | None = None,
    validation: Sequence[str] = (),
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> PreferenceData:
    """Reads, encodes, packs and mixes the sources of a run.

    Args:
      reading: how.
      train: source strings (`data.records`).
      weights: one for each training source, or None: by size.
      validation: source strings. Empty: hold pairs out of the training sources, by their prompts' text: no prompt is on
        both sides.
      validation_fraction: how much to hold out then; 0: nothing.
      seed: of the shuffling.

    Raises:
      InputError: a source or record cannot be read, or nothing is left to train on.
    """
    if not train:
        raise InputError('no training data: name at least one source')
    held_out: list[EncodedPair] = []
    rows, others = [], []
    for source in train:
        pairs = reading.pairs([source])
        if not validation and validation_fraction:
            kept = [pair for pair in pairs if not _is_held_out(pair, validation_fraction)]
            held_out += [pair for pair in pairs if _is_held_out(pair, validation_fraction)]
            pairs = kept
        rows.append(reading.rows(pairs, source))
        if reading.judged:
            others.append(reading.other_answers(pairs, source))
    validation_rows = None
    if validation:
        held_out, origin = reading.pairs(validation), ', '.join(validation)
        validation_rows = reading.rows(held_out, origin)
    elif held_out:
        origin = f'{len(held_out)} {"answers" if reading.judged else "pairs"} that are held out'
        validation_rows = reading.rows(held_out, origin)
    elif validation_fraction:
        _log.warning('no validation: none of the prompts falls in the %g held out', validation_fraction)
    most = max(one.num_pairs for one in (*rows, *others))
    for one in (*rows, *others):
        one.num_pairs = most  # rows of all sources are of one shape
    identity = [[one.fingerprint for one in rows], list(map(float, weights or [])), reading.tokenizer.sha256]
    found = PreferenceData(
        train=mix(rows, weights, seed),
        train_rows=tuple(rows),
        validation=validation_rows,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
    )
    if reading.judged:
        to_validate = reading.other_answers(held_out, origin) if validation_rows else None
        # Another order: the answers that a row is compared with are of no fixed rows.
        mixed = mix(others, weights, seed + 1)
        beside = PreferenceData(mixed, tuple(others), to_validate, found.fingerprint)
        found = dataclasses.replace(found, others=beside)
    return found


def _without_oldest(prompt: Messages) -> Messages | None:
    """A prompt without its first question and what came of it; None where it is the only one."""
    start = int(prompt[0].role == 'system')
    later = [place for place in range(start + 1, len(prompt)) if prompt[place].role == 'user']
    return prompt[:start] + prompt[later[0] :] if later else None


def _is_held_out(pair: EncodedPair, fraction: float) -> bool:
    digest = hashlib.sha256(pair.prompt.tobytes()).digest()
    return int.from_bytes(digest[:8], 'big') < fraction * 2**64
