"""A reward model as a judge of answers: its score at each answer's last token.

The answers to a prompt stand in rows behind it, which is read once, each in a segment of its own that sees the prompt
and no other answer. How a prompt's rows are made follows from its own answers, so that an answer is scored alike
whatever else is judged.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.errors import InputError
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.ops.attention_shared_prefix import SHARED
from llama_jax.partitioning import place_whole
from llama_jax.rl.rewards import Record, name_of
from llama_jax.rl.rollout import Rollout
from llama_jax.types import Params

# A row takes answers until it is this long, or 4 times its longest path where that is more (up to the second).
_USUAL_ROW, _LONGEST_ROW = 512, 2048
_LEAST_WIDTH = 32

# A prompt, and the answers behind it by their places among all.
_Row = tuple[tuple[int, ...], list[tuple[int, tuple[int, ...]]]]


class ModelReward:
    """Scores before any sigmoid, as a reward model was trained to give them."""

    def __init__(self, model: LlamaForRewardModel, params: Params):
        """Args: model: its partitioner, where it has one, places the rows. params: its weights."""
        self._model, self.params = model, params

    def __call__(self, rollouts: Sequence[Rollout], records: Sequence[Record]) -> Float[np.ndarray, ' n']:
        """A `rewards.Reward`.

        Raises:
          InputError: an answer is longer than the model reads, or holds what is no token of it; the record is named.
        """
        model, partitioner = self._model, self._model.partitioner
        self._check(rollouts)
        # Where rows are split over devices, their kernel knows of no shared prompt: each answer has a row of its own.
        whole_rows = partitioner is None or partitioner.axis_size('length') == 1
        num_rows = 1 if partitioner is None else partitioner.axis_size('batch')
        multiple = 1 if partitioner is None else 2 * partitioner.axis_size('length')
        by_shape: dict[tuple[int, bool], list[_Row]] = defaultdict(list)
        for row in _rows(rollouts, whole_rows):
            by_shape[_width(row, multiple), len(row[1]) > 1].append(row)
        scores = np.zeros(len(rollouts))
        for (width, shares), rows in sorted(by_shape.items()):
            of_shape: Any = model.clone(attention_implementation='shared_prefix') if shares else model
            for start in range(0, len(rows), num_rows):
                some = rows[start : start + num_rows]
                tokens, positions, segment_ids = np.zeros((3, num_rows, width), np.int32)
                for place, row in enumerate(some):
                    _fill(row, tokens[place], positions[place], segment_ids[place], shares)
                arrays = [tokens, positions, segment_ids]
                if partitioner is not None:
                    sharding = partitioner.sharding(('batch', 'length'), tokens.shape, 'batch')
                    arrays = [place_whole(array, sharding) for array in arrays]
                found = np.asarray(_scores(of_shape, self.params, *arrays))
                for place, (prompt, answers) in enumerate(some):
                    end = len(prompt)
                    for index, answer in answers:
                        end += len(answer)
                        scores[index] = found[place, end - 1]
        return scores

    def _check(self, rollouts: Sequence[Rollout]) -> None:
        config = self._model.config
        for one in rollouts:
            length, largest = len(one.prompt) + len(one.answer), max(*one.prompt, *one.answer)
            if length > config.max_seq_len:
                raise InputError(
                    f'prompt and answer of {name_of(one)} are {length} tokens; the reward model reads '
                    f'{config.max_seq_len}, so shorten them'
                )
            if largest >= config.vocab_size:
                raise InputError(
                    f'{name_of(one)} holds token {largest}, for which the reward model has no row: it has '
                    f'{config.vocab_size}; it must have the tokenizer of the policy'
                )


def _rows(rollouts: Sequence[Rollout], share: bool) -> Iterator[_Row]:
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for index, one in enumerate(rollouts):
        groups[one.record, one.prompt].append(index)
    for (_, prompt), indices in groups.items():
        path = len(prompt) + max(len(rollouts[index].answer) for index in indices)
        limit = max(_USUAL_ROW, min(4 * path, _LONGEST_ROW), path)
        answers, size = [], len(prompt)
        for index in indices:
            answer = rollouts[index].answer
            if answers and (not share or size + len(answer) > limit):
                yield prompt, answers
                answers, size = [], len(prompt)
            answers.append((index, answer))
            size += len(answer)
        yield prompt, answers


def _width(row: _Row, multiple: int) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: few shapes, and little padding."""
    size = len(row[0]) + sum(len(answer) for _, answer in row[1])
    power = max(_LEAST_WIDTH, 1 << (size - 1).bit_length())
    width = power * 3 // 4 if power > _LEAST_WIDTH and size <= power * 3 // 4 else power
    return -(-width // multiple) * multiple


def _fill(
    row: _Row,
    tokens: Int[np.ndarray, ' T'],
    positions: Int[np.ndarray, ' T'],
    segment_ids: Int[np.ndarray, ' T'],
    shares: bool,
) -> None:
    """Writes a row; what is left is padding, of segment 0."""
    prompt, answers = row
    end = len(prompt)
    tokens[:end], positions[:end] = prompt, np.arange(end)
    segment_ids[:end] = SHARED if shares else 1
    for segment, (_, answer) in enumerate(answers, 1):
        start, end = end, end + len(answer)
        tokens[start:end] = answer
        positions[start:end] = np.arange(len(prompt), len(prompt) + len(answer))
        segment_ids[start:end] = segment


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    model: LlamaForRewardModel,
    params: Params,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'],
) -> Float[Array, 'B T']:
    found: Any = model.apply({'params': params}, tokens, positions, segment_ids)
    if model.partitioner is not None:  # so that every process can read all of them
        found = jax.lax.with_sharding_constraint(found, model.partitioner.sharding())
    return found
