"""Log-likelihoods of continuations of a context, and of each token of texts, many at a time on the mesh.

Continuations of one context stand in one row: the context once, then each continuation at the positions behind it, in a
segment of its own. Through 'shared_prefix' attention they see the context and not each other, so the choices of a
question cost little more than the question itself. Rows are taken longest first in a few padded shapes, each compiled
once, and only hidden states that predict a continuation's token meet the head.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.errors import InputError
from llama_jax.inference.decoding import readable
from llama_jax.inference.prompts import check_prompts
from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.ops.attention_shared_prefix import SHARED
from llama_jax.ops.linear import einsum
from llama_jax.partitioning import place_whole
from llama_jax.types import Params

# Tokens of a context, and those whose probability is asked for.
Pair = tuple[tuple[int, ...], tuple[int, ...]]

# Likely tokens that are told of a place: what OpenAI's service tells.
MAX_CANDIDATES = 20
# Rows are at least so wide, and this many of their columns at a time meet the head.
_MIN_WIDTH, _HEAD_CHUNKS = 32, 8
# A row takes continuations until it is this long, or 4 times its longest path where that is more (up to the second).
_USUAL_ROW, _LONGEST_ROW = 512, 2048


@dataclasses.dataclass(frozen=True)
class Score:
    """What the model makes of one continuation.

    Attributes:
      log_probability: natural logarithm, summed over its tokens.
      is_greedy: each of its tokens is the most likely one.
    """

    log_probability: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """What the model makes of one token in its place, in natural logarithms.

    Attributes:
      token: its id.
      log_probability: by the model, before any setting; None for the first of a text, which nothing predicts.
      filtered_log_probability: by the distribution that it was drawn from; None where it was given.
      candidates: the most likely ones there and their log-probabilities by the model, most likely first; the token's
        own, where it is among them, is the very number of `log_probability`.
    """

    token: int
    log_probability: float | None = None
    filtered_log_probability: float | None = None
    candidates: tuple[tuple[int, float], ...] = ()

    @classmethod
    def create(
        cls,
        token: int,
        log_probability: float,
        candidates: Sequence[tuple[int, float]],
        filtered_log_probability: float | None = None,
    ) -> 'TokenScore':
        """Of what programs found, whose sums may differ in their last bit."""
        same = dict(candidates).get(token, log_probability)
        return cls(token, same, filtered_log_probability, tuple(candidates))


@dataclasses.dataclass
class _Row:
    """One context with continuations, by their index among the pairs.

    Attributes:
      num_tokens: that the model reads.
      num_targets: that it predicts.
    """

    context: tuple[int, ...]
    num_tokens: int
    num_targets: int = 0
    members: list[tuple[int, tuple[int, ...]]] = dataclasses.field(default_factory=list)

    def size_with(self, continuation: Sequence[int]) -> int:
        """The width that the row needs with one more: its last token is predicted, not read."""
        return max(self.num_tokens + len(continuation) - 1, self.num_targets + len(continuation))

    def add(self, index: int, continuation: tuple[int, ...]) -> None:
        self.members.append((index, continuation))
        self.num_tokens += len(continuation) - 1
        self.num_targets += len(continuation)

    @property
    def size(self) -> int:
        return max(self.num_tokens, self.num_targets)

    def places(self) -> Iterator[tuple[int, slice]]:
        """(index of a pair, where its targets are)."""
        end = 0
        for index, continuation in self.members:
            start, end = end, end + len(continuation)
            yield index, slice(start, end)


@flax.struct.dataclass
class _Batch:
    """What the model reads and predicts: row b's target t follows the token at reads[b, t]. In NumPy on the host."""

    tokens: Int[Any, 'B T']
    positions: Int[Any, 'B T']
    segment_ids: Int[Any, 'B T']
    reads: Int[Any, 'B T']
    targets: Int[Any, 'B T']


@flax.struct.dataclass
class _Found:
    """Of each target of a batch."""

    log_probabilities: Float[Array, 'B T']
    is_greedy: Bool[Array, 'B T']
    candidates: Int[Array, 'B T n']
    candidate_log_probabilities: Float[Array, 'B T n']


def score(
    model: LlamaForCausalLM, params: Params, pairs: Sequence[Pair], *, batch_tokens: int = 8192
) -> Iterator[tuple[int, Score]]:
    """(index of a pair, its score) in the order in which they are found, long rows first.

    Every process of a job goes through the same batches and gets all scores.

    Args:
      model: its partitioner, where it has one, places the batches.
      params: its weights.
      pairs: contexts and continuations, each of at least one token, together one more than the model's context at most.
      batch_tokens: of a padded batch, about; what fits into memory.

    Raises:
      InputError: a pair is empty or too long, or batch_tokens is not positive.
    """
    if batch_tokens < 1:
        raise InputError(f'batch_tokens is {batch_tokens}; it must be at least 1')
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise InputError(f'pair {index} has {len(context)} + {len(continuation)} tokens; each needs one')
        if len(context) + len(continuation) > model.config.max_seq_len + 1:
            raise InputError(
                f'pair {index} has {len(context)} + {len(continuation)} tokens; the model reads '
                f'{model.config.max_seq_len} and predicts the next, so shorten it'
            )
    if (
        pairs
        and (largest := max(max(max(pair[0]), max(pair[1])) for pair in pairs)) >= model.config.vocab_size
    ):
        raise InputError(
            f'a text holds token {largest}, for which the model has no row: it has {model.config.vocab_size}; give '
            'the tokenizer that the weights were trained with'
        )
    # Where rows are split over devices, their kernel knows of no shared context: each pair has a row of its own.
    whole_rows = model.partitioner is None or model.partitioner.axis_size('length') == 1
    for rows, found in _found(model, params, _rows(pairs, share=whole_rows), batch_tokens, 0):
        for place, row in enumerate(rows):
            for index, of in row.places():
                log_probability = float(found.log_probabilities[place, of].sum(dtype=np.float64))
                yield index, Score(log_probability, bool(found.is_greedy[place, of].all()))


def score_tokens(
    model: LlamaForCausalLM,
    params: Params,
    texts: Sequence[Sequence[int]],
    *,
    num_candidates: int = 0,
    batch_tokens: int = 8192,
) -> list[list[TokenScore]]:
    """What the model makes of each token of each text, which is read once.

    Args:
      model: its partitioner, where it has one, places the batches.
      params: its weights.
      texts: token ids, each of at least one and of the model's context at most.
      num_candidates: tokens that are most likely at each place, to be told too; at most `MAX_CANDIDATES`.
      batch_tokens: see `score`.

    Raises:
      InputError: a text cannot be read, or a number is out of range.
    """
    check_candidates(num_candidates)
    check_prompts(texts, model.config, new_tokens=0)
    scores = [[TokenScore(int(text[0]))] for text in texts]
    rows = []
    for index, text in enumerate(texts):
        if len(text) > 1:
            rows.append(_Row(tuple(text[:1]), 1))
            rows[-1].add(index, tuple(text[1:]))
    width = min(MAX_CANDIDATES, model.config.vocab_size) if num_candidates else 0
    for batch_rows, found in _found(model, params, rows, batch_tokens, width):
        for place, row in enumerate(batch_rows):
            for (index, of), (_, tokens) in zip(row.places(), row.members, strict=True):
                log_probabilities = found.log_probabilities[place, of].tolist()
                ids = found.candidates[place, of, :num_candidates].tolist()
                values = found.candidate_log_probabilities[place, of, :num_candidates].tolist()
                for token, value, *both in zip(tokens, log_probabilities, ids, values, strict=True):
                    scores[index].append(TokenScore.create(int(token), value, list(zip(*both, strict=True))))
    return scores


def check_candidates(num_candidates: int) -> None:
    """Refuses more candidates than programs look for.

    Raises:
      InputError: there are too many, or fewer than none.
    """
    if not 0 <= num_candidates <= MAX_CANDIDATES:
        raise InputError(
            f'candidates of a token are {num_candidates}; there may be from 0 (the token alone) to {MAX_CANDIDATES}'
        )


def _found(
    model: LlamaForCausalLM, params: Params, rows: Iterable[_Row], batch_tokens: int, num_candidates: int
) -> Iterator[tuple[list[_Row], '_Found']]:
    """Rows and what was found of them, long ones first; on the host."""
    # On the devices while the host prepares the next batch and reads the one before.
    running: tuple[list[_Row], _Found] | None = None
    for batch_rows, shape in _batches(sorted(rows, key=lambda row: -row.size), model, batch_tokens):
        launched = batch_rows, _launch(model, params, batch_rows, shape, num_candidates)
        if running:
            yield running[0], jax.device_get(running[1])
        running = launched
    if running:
        yield running[0], jax.device_get(running[1])


def _rows(pairs: Sequence[Pair], share: bool) -> Iterator[_Row]:
    """Pairs of equal contexts packed together, in their order."""
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (context, _) in enumerate(pairs):
        members[context].append(index)
    for context, indices in members.items():
        path = len(context) + max(len(pairs[index][1]) for index in indices)
        limit = max(_USUAL_ROW, min(4 * path, _LONGEST_ROW), path)
        row = _Row(context, len(context))
        for index in indices:
            continuation = pairs[index][1]
            if row.members and (not share or row.size_with(continuation) > limit):
                yield row
                row = _Row(context, len(context))
            row.add(index, continuation)
        yield row


def _batches(
    rows: Sequence[_Row], model: LlamaForCausalLM, batch_tokens: int
) -> Iterator[tuple[list[_Row], tuple[int, int]]]:
    """Rows of about one size, and the shape [B, T] that they are padded to."""
    of_batch = of_length = 1
    if model.partitioner is not None:
        of_batch, of_length = model.partitioner.axis_size('batch'), model.partitioner.axis_size('length')
    start = 0
    while start < len(rows):
        width = _rounded(rows[start].size, _HEAD_CHUNKS * 2 * of_length)
        count = max(batch_tokens // width, 1)
        while count // 4 >= len(rows):  # few rows in all: in steps of 4, so that there are few shapes
            count //= 4
        count = max(count // of_batch, 1) * of_batch
        yield list(rows[start : start + count]), (count, width)
        start += count


def _rounded(size: int, multiple: int) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: a few shapes, a fifth of padding at the most on average."""
    power = max(_MIN_WIDTH, 1 << (size - 1).bit_length())
    width = power * 3 // 4 if power > _MIN_WIDTH and size <= power * 3 // 4 else power
    return -(-width // multiple) * multiple


def _launch(
    model: LlamaForCausalLM, params: Params, rows: Sequence[_Row], shape: tuple[int, int], num_candidates: int
) -> _Found:
    batch = _Batch(*(np.zeros(shape, np.int32) for _ in dataclasses.fields(_Batch)))
    shares = any(len(row.members) > 1 for row in rows)
    for place, row in enumerate(rows):
        _fill(batch, place, row, shares)
    model = model.clone(attention_implementation='shared_prefix') if shares else model
    if model.partitioner is not None:
        sharding = model.partitioner.sharding(('batch', 'length'), shape, 'batch')
        batch = jax.tree.map(lambda array: place_whole(array, sharding), batch)
    num_targets = max(row.num_targets for row in rows)
    return _score(model, num_candidates, params, batch, np.int32(num_targets))


def _fill(batch: _Batch, place: int, row: _Row, shares: bool) -> None:
    """Writes one row of the batch; what is left is padding, of segment 0."""
    end = len(row.context)
    batch.tokens[place, :end] = row.context
    batch.positions[place, :end] = np.arange(end)
    batch.segment_ids[place, :end] = SHARED if shares else 1
    target = 0
    for segment, (_, continuation) in enumerate(row.members, 1):
        start, end = end, end + len(continuation) - 1
        batch.tokens[place, start:end] = continuation[:-1]
        batch.positions[place, start:end] = np.arange(len(row.context), len(row.context) + end - start)
        batch.segment_ids[place, start:end] = segment
        batch.reads[place, target] = len(row.context) - 1
        batch.reads[place, target + 1 : target + len(continuation)] = np.arange(start, end)
        batch.targets[place, target : target + len(continuation)] = continuation
        target += len(continuation)


@functools.partial(jax.jit, static_argnames=('model', 'num_candidates'))
def _score(
    model: LlamaForCausalLM,
    num_candidates: int,
    params: Params,
    batch: _Batch,
    num_targets: Int[Array, ''],
) -> _Found:
    """Log-probability of each target, whether it is the most likely token, and those; `num_targets` a row at most."""
    read = batch.tokens, batch.positions, batch.segment_ids
    hidden, _ = model.apply({'params': params}, *read, method='hidden')
    hidden = jnp.take_along_axis(hidden, batch.reads[:, :, None], axis=1)
    head = head_weight(params)
    size = batch.tokens.shape[1] // _HEAD_CHUNKS

    def chunk(index, found):
        def at(array):
            return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1)

        logits = einsum('btd,vd->btv', at(hidden), head, jnp.float32)
        target = at(batch.targets)
        target_logits = jnp.take_along_axis(logits, target[:, :, None], axis=2)[:, :, 0]
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        best, tokens = jax.lax.top_k(logits, num_candidates)
        values = _Found(
            target_logits - normalizer,
            jnp.argmax(logits, axis=-1).astype(target.dtype) == target,
            tokens,
            best - normalizer[:, :, None],
        )

        def put(array, value):
            return jax.lax.dynamic_update_slice_in_dim(array, value, index * size, axis=1)

        return jax.tree.map(put, found, values)

    # As many chunks as have targets: a number that the program reads, so that it serves all batches of its shape.
    each, several = batch.tokens.shape, (*batch.tokens.shape, num_candidates)
    start = _Found(
        *map(jnp.zeros, (each, each, several, several), (jnp.float32, bool, jnp.int32, jnp.float32))
    )
    return readable(model, jax.lax.fori_loop(0, (num_targets + size - 1) // size, chunk, start))
