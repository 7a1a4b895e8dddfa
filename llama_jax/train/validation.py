"""Validation: how well text that is not trained on is predicted, by likelihood alone, whatever training minimises."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from llama_jax.data.examples import ExampleRows
from llama_jax.data.loader import PaddedRows, batches, collate_lm, read_ahead
from llama_jax.data.packing import Row, Rows
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.train.loop import Measurement
from llama_jax.train.state import TrainState
from llama_jax.types import Array, LMBatch, Params

_log = logging.getLogger(__name__)

FIGURES = ('validation_loss', 'validation_bits_per_byte')


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
    """A token's nats as a byte's bits: of all tokens but each document's BOS, or of those of answers alone."""
    examples = isinstance(rows, ExampleRows)
    predicted = rows.num_counted if examples else rows.num_tokens - rows.num_documents
    return nats_per_token * predicted / rows.num_bytes / math.log(2)


def evaluate_rows(
    loss_step: Callable[[Params, LMBatch], tuple[Array, Array]],
    params: Params,
    rows: Rows,
    *,
    target: LMBatch,
    max_rows: int = 0,
    collate: Callable[[Sequence[Row]], LMBatch] = collate_lm,
    pause: Callable[[], None] = lambda: None,
) -> Perplexity:
    """Perplexity over the first `max_rows` rows (0: all), however the last batch falls.

    Args:
      loss_step: from `make_loss_step`.
      params: of the model.
      rows: packed text.
      target: an abstract batch with its shardings.
      max_rows: 0 for all.
      collate: makes a batch of rows.
      pause: called after each batch; may raise.
    """
    padded = PaddedRows(rows, target.tokens.shape[0], max_rows)
    losses, weights = [], []
    for batch in batches(padded, target, collate=collate):
        loss, weight = loss_step(params, batch)
        losses.append(loss)
        weights.append(weight)
        pause()
    total = math.fsum(float(weight) for weight in weights)
    nats = math.fsum(float(loss) for loss in losses) / total
    return Perplexity(nats, bits_per_byte(nats, rows), int(total))


def make_loss_step(
    model: LlamaForCausalLM, num_chunks: int = 1
) -> Callable[[Params, LMBatch], tuple[Array, Array]]:
    """A jitted (params, batch) -> (sum of negative log-likelihoods, number of predicted tokens)."""
    loss_fn = language_model_loss(model, num_chunks=num_chunks)

    @jax.jit
    def step(params: Params, batch: LMBatch) -> tuple[Array, Array]:
        loss, weight, _ = loss_fn(params, None, batch, jax.random.key(0))
        return loss, weight

    return step


def make_validation(
    model: LlamaForCausalLM,
    rows: Rows | Mapping[str, Rows],
    *,
    every: int,
    target: LMBatch,
    view: Callable[[TrainState], Params] = lambda state: state.params,
    max_rows: int = 0,
    num_chunks: int = 1,
    collate: Callable[[Sequence[Row]], LMBatch] = collate_lm,
) -> Measurement:
    """Validation as the loop makes it, after every so many updates.

    Args:
      model: see `make_loss_step`.
      rows: see `evaluate_rows`; of several by name each is measured too, as 'validation_loss/NAME'.
      every: updates between two; 0: after the last only.
      target: see `evaluate_rows`.
      view: state -> the model's weights, which are trained whole or in part.
      max_rows: of each; 0 for all.
      num_chunks: see `make_loss_step`.
      collate: see `evaluate_rows`.
    """
    loss_step = make_loss_step(model, num_chunks)

    parts = rows if isinstance(rows, Mapping) else {'': rows}

    def measure(state: TrainState, step: int, pause: Callable[[], None]) -> dict[str, float]:
        weights = view(state)
        found = {
            name: evaluate_rows(
                loss_step, weights, part, target=target, max_rows=max_rows, collate=collate, pause=pause
            )
            for name, part in parts.items()
        }
        nats, bits = _together(found)
        _log.info('step %d: validation %.4f nats/token, %.4f bits/byte', step, nats, bits)
        own = {f'{FIGURES[0]}/{name}': one.nats_per_token for name, one in found.items() if name}
        return {**dict(zip(FIGURES, (nats, bits), strict=True)), **own}

    return Measurement(every, measure, FIGURES)


def _together(found: Mapping[str, Perplexity]) -> tuple[float, float]:
    """(nats per token, bits per byte) over all parts, each by its tokens."""
    if len(found) == 1:
        (one,) = found.values()
        return one.nats_per_token, one.bits_per_byte
    tokens = sum(one.num_tokens for one in found.values())
    nats = [one.nats_per_token * one.num_tokens for one in found.values()]
    # A part has so many bytes as its bits and nats say.
    size = [one.nats_per_token / math.log(2) * one.num_tokens / one.bits_per_byte for one in found.values()]
    return math.fsum(nats) / tokens, math.fsum(nats) / math.log(2) / math.fsum(size)


def count_predicted(rows: Rows, max_rows: int = 0) -> int:
    """Tokens that are predicted in the first `max_rows` rows (0: all)."""
    if not max_rows or max_rows >= len(rows):
        return rows.num_tokens - rows.num_documents
    segments = (row['segment_ids'] for row in read_ahead(rows, max_rows))
    return sum(int(np.sum((ids[:-1] == ids[1:]) & (ids[1:] != 0))) for ids in segments)
