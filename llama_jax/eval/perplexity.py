"""Perplexity on rows of text, and the unigram and bigram models that any language model has to beat."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int

from llama_jax.data.loader import PaddedRows, batches
from llama_jax.data.packing import Row, Rows
from llama_jax.partitioning import Partitioner
from llama_jax.types import Array, LMBatch, Params


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well text is predicted.

    Attributes:
      nats_per_token: mean negative log-likelihood of the predicted tokens.
      bits_per_byte: the same per byte of text, which compares across tokenizers.
      num_tokens: predicted.
    """

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int


def bits_per_byte(nats_per_token: float, rows: Rows) -> float:
    """A token's nats as a byte's bits: each document's tokens but its BOS are predicted, each byte belongs to one."""
    predicted = rows.num_tokens - rows.num_documents
    return nats_per_token * predicted / rows.num_bytes / math.log(2)


def evaluate_rows(
    loss_step: Callable[[Params, LMBatch], tuple[Array, Array]],
    params: Params,
    rows: Rows,
    *,
    batch_size: int,
    partitioner: Partitioner,
    max_rows: int = 0,
) -> Perplexity:
    """Perplexity over the first `max_rows` rows (0: all), however the last batch falls.

    Args:
      loss_step: from `losses.language_model.evaluate_loss`.
      params: of the model.
      rows: packed text.
      batch_size: rows at a time.
      partitioner: places the batches.
      max_rows: 0 for all.
    """
    padded = PaddedRows(rows, batch_size, max_rows)
    losses, weights = [], []
    for batch in batches(padded, batch_size=batch_size, seq_len=rows.seq_len, partitioner=partitioner):
        loss, weight = loss_step(params, batch)
        losses.append(loss)
        weights.append(weight)
    total = math.fsum(float(weight) for weight in weights)
    nats = math.fsum(float(loss) for loss in losses) / total
    return Perplexity(nats, bits_per_byte(nats, rows), int(total))


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Validation loss, nats per token, of two count models fitted on the training tokens."""

    unigram: float
    bigram: float


def fit_baselines(train: Iterable[Row], validation: Iterable[Row], vocab_size: int) -> Baselines:
    """Unigram (add-one) and interpolated bigram, on exactly the targets that the model is trained and scored on.

    p(w | v) = a c(v, w) / c(v) + (1 - a) p(w), Jelinek and Mercer's interpolation, with `a` chosen on the validation
    targets themselves: a favour to the baseline.
    """
    previous, following = _targets(train)
    unigram = np.bincount(following, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    context = np.bincount(previous, minlength=vocab_size)
    pairs, counts = np.unique(previous * vocab_size + following, return_counts=True)

    previous, following = _targets(validation)
    wanted = previous * vocab_size + following
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    conditional = count / np.maximum(context[previous], 1)

    def loss(share: Float[np.ndarray, 'N'] | float) -> float:
        # A context never seen in training has no bigram: all its weight is the unigram's.
        share = np.where(context[previous] > 0, share, 0.0)
        return float(-np.mean(np.log(share * conditional + (1 - share) * unigram[following])))

    return Baselines(unigram=loss(0.0), bigram=min(loss(share) for share in np.linspace(0.05, 0.95, 19)))


def _targets(rows: Iterable[Row]) -> tuple[Int[np.ndarray, 'N'], Int[np.ndarray, 'N']]:
    """Every counted (token, next token) of the rows."""
    previous, following = [], []
    for row in rows:
        tokens, segments = row['tokens'].astype(np.int64), row['segment_ids']
        counted = (segments[:-1] == segments[1:]) & (segments[1:] != 0)
        previous.append(tokens[:-1][counted])
        following.append(tokens[1:][counted])
    return np.concatenate(previous), np.concatenate(following)
