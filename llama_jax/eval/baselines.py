"""The unigram and bigram models that any language model has to beat."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int

from llama_jax.data.packing import Row

# Targets that are counted at a time, and those of the validation rows that are held: they bound the memory, whatever
# the vocabulary and however many rows there are.
_CHUNK, _MAX_VALIDATION_TARGETS = 1 << 20, 1 << 23

_SAY_EVERY = 10.0  # seconds

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Validation loss, nats per token, of two count models fitted on the training tokens."""

    unigram: float
    bigram: float


def fit_baselines(train: Iterable[Row], validation: Iterable[Row], vocab_size: int) -> Baselines:
    """Unigram (add-one) and interpolated bigram, on exactly the targets that the model is trained and scored on.

    p(w | v) = a c(v, w) / c(v) + (1 - a) p(w), Jelinek and Mercer's interpolation, with `a` chosen on the validation
    targets themselves: a favour to the baseline. Of all pairs only those that validation asks for are counted, so some
    500 MB are enough; of validation rows with more than 8 million targets the first so many are scored.
    """
    pairs, which = np.unique(_first_pairs(validation, vocab_size), return_inverse=True)
    previous, following = np.divmod(pairs, vocab_size)
    unigram, context = np.ones(vocab_size), np.zeros(vocab_size, np.int64)
    count = np.zeros(len(pairs), np.int64)
    for chunk in _pairs(train, vocab_size):
        seen, times = np.unique(chunk, return_counts=True)
        context += np.bincount(seen // vocab_size, times, vocab_size).astype(np.int64)
        unigram += np.bincount(seen % vocab_size, times, vocab_size)
        place = np.minimum(np.searchsorted(pairs, seen), len(pairs) - 1)
        is_wanted = pairs[place] == seen
        count[place[is_wanted]] += times[is_wanted]
    unigram /= unigram.sum()
    conditional = count / np.maximum(context[previous], 1)

    def loss(share: Float[np.ndarray, 'N'] | float) -> float:
        # A context never seen in training has no bigram: all its weight is the unigram's.
        share = np.where(context[previous] > 0, share, 0.0)
        log_probability = np.log(share * conditional + (1 - share) * unigram[following])
        return float(-np.mean(log_probability[which]))

    return Baselines(unigram=loss(0.0), bigram=min(loss(share) for share in np.linspace(0.05, 0.95, 19)))


def in_time(rows: Iterable[Row], count: int, seconds: int) -> Iterator[Row]:
    """The rows, of which there are `count`, as far as they are read within so many seconds; tells how far it is."""
    begin = said = time.monotonic()
    for number, row in enumerate(rows):
        now = time.monotonic()
        if now - begin > seconds:
            _log.warning(
                'unigram and bigram are fitted on %s of %s rows: %d s have passed', number, count, seconds
            )
            return
        if now - said > _SAY_EVERY:
            _log.info('unigram and bigram: %s of %s rows are counted', number, count)
            said = now
        yield row


def _first_pairs(rows: Iterable[Row], vocab_size: int) -> Int[np.ndarray, 'N']:
    chunks, size = [], 0
    for chunk in _pairs(rows, vocab_size):
        chunks.append(chunk[: _MAX_VALIDATION_TARGETS - size])
        size += len(chunks[-1])
        if size == _MAX_VALIDATION_TARGETS:
            break
    return np.concatenate(chunks)


def _pairs(rows: Iterable[Row], vocab_size: int) -> Iterator[Int[np.ndarray, 'N']]:
    """Every counted (token, next token) of the rows as token * vocab_size + next, some at a time."""
    found, size = [], 0
    for row in rows:
        tokens, segments = row['tokens'].astype(np.int64), row['segment_ids']
        counted = (segments[:-1] == segments[1:]) & (segments[1:] != 0)
        found.append((tokens[:-1] * vocab_size + tokens[1:])[counted])
        size += len(found[-1])
        if size >= _CHUNK:
            yield np.concatenate(found)
            found, size = [], 0
    if found:
        yield np.concatenate(found)
