"""An iteration of policy gradients: answers that were drawn at once, and the minibatches that they are learnt from.

Which answers stand in a minibatch, and where in its rows, follows from the seed, the iteration's number and the
minibatch's alone; so what is kept of an iteration on disk is its answers and their numbers.
"""

import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_jax.data.packing import best_fit
from llama_jax.losses.policy import Algorithm
from llama_jax.types import PolicyBatch

_NUMBERS = ('sampled', 'old', 'reference', 'values', 'advantages', 'returns', 'importance')  # of a token each
_NAMES = ('prompts', 'answers', *_NUMBERS)


@dataclasses.dataclass(frozen=True)
class Shape:
    """How minibatches are made.

    Attributes:
      answers: in a minibatch.
      seq_len: T, of a row.
      multiple: a number of rows is a multiple of it.
      max_new_tokens: that an answer may have.
      seed: of the order of answers.
    """

    answers: int
    seq_len: int
    multiple: int
    max_new_tokens: int
    seed: int

    @property
    def most_in_row(self) -> int:
        """P: more answers than this do not stand in a row."""
        return max(1, min(self.answers, self.seq_len // 8))

    @property
    def step(self) -> int:
        """Rows come in multiples of it: some eight numbers of rows are compiled, and few rows are empty."""
        return self.multiple * max(1, -(-self.answers // (8 * self.multiple)))


@dataclasses.dataclass(frozen=True)
class Iteration:
    """Answers and their numbers, those of a token as long as the answer.

    Attributes:
      begun: updates done before its first.
      number: of the iteration, from 0.
      prompts: token ids of what was asked, one an answer.
      answers: token ids.
      sampled: log-probabilities by the sampler.
      old: by the policy.
      reference: by the reference; `old` where there is none.
      values: what was expected.
      advantages: what was more than expected.
      returns: what came.
      importance: what a token's loss is multiplied by.
      beta: weight of the divergence.
      figures: what is logged of it.
    """

    begun: int
    number: int
    prompts: list[np.ndarray]
    answers: list[np.ndarray]
    sampled: list[np.ndarray]
    old: list[np.ndarray]
    reference: list[np.ndarray]
    values: list[np.ndarray]
    advantages: list[np.ndarray]
    returns: list[np.ndarray]
    importance: list[np.ndarray]
    beta: float
    figures: dict[str, float]

    def to_bytes(self) -> bytes:
        """A file of all of it."""
        arrays: dict[str, Any] = {}
        for name in _NAMES:
            ragged = getattr(self, name)
            arrays[name] = np.concatenate(ragged)
            arrays[f'{name}_lengths'] = np.array([len(one) for one in ragged])
        plain = {name: getattr(self, name) for name in ('begun', 'number', 'beta', 'figures')}
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, plain=np.array(json.dumps(plain)), **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> 'Iteration':
        """What `to_bytes` made.

        Raises:
          ValueError: it is damaged.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as held:
                values: dict[str, Any] = json.loads(str(held['plain']))
                for name in _NAMES:
                    values[name] = np.split(held[name], np.cumsum(held[f'{name}_lengths'])[:-1])
                return cls(**values)
        except (zipfile.BadZipFile, KeyError, OSError, EOFError, TypeError) as error:
            raise ValueError(f'it holds no iteration: {type(error).__name__}') from error

    def num_minibatches(self, shape: Shape, epochs: int) -> int:
        """Of all its epochs."""
        return epochs * (len(self.answers) // shape.answers)

    def numbers_of(self, shape: Shape, index: int) -> list[int]:
        """Which answers stand in a minibatch: each epoch has all of them once, in another order."""
        per_epoch = len(self.answers) // shape.answers
        epoch, place = divmod(index, per_epoch)
        order = np.random.default_rng([shape.seed, self.number, epoch]).permutation(len(self.answers))
        return [int(one) for one in order[place * shape.answers : (place + 1) * shape.answers]]

    def num_rows(self, shape: Shape, epochs: int) -> int:
        """Rows of every one of its minibatches: as many as the one that takes most."""
        most = max(
            len(_rows(self._lengths(self.numbers_of(shape, index)), shape))
            for index in range(self.num_minibatches(shape, epochs))
        )
        return -(-most // shape.step) * shape.step

    def _lengths(self, numbers: Sequence[int]) -> list[int]:
        return [len(self.prompts[number]) + len(self.answers[number]) - 1 for number in numbers]

    def minibatch(
        self, shape: Shape, index: int, num_rows: int, algorithm: Algorithm
    ) -> tuple[PolicyBatch, list[tuple[int, int, slice]]]:
        """A minibatch on the host, and where (answer, row, slots) each answer's targets stand in it."""
        numbers = self.numbers_of(shape, index)
        rows = _rows(self._lengths(numbers), shape)
        assert len(rows) <= num_rows
        size = num_rows, shape.seq_len
        ids = {name: np.zeros(size, np.int32) for name in ('tokens', 'targets', 'positions', 'segment_ids')}
        made = {
            name: np.zeros(size, np.float32)
            for name in ('weights', 'advantages', 'old', 'reference', 'importance', 'values', 'returns')
        }
        lengths = np.zeros((num_rows, shape.most_in_row), np.int32)
        counts, places = np.zeros(num_rows, np.float32), []
        for row, places_in_row in enumerate(rows):
            start = 0
            for segment, place in enumerate(places_in_row, 1):
                number = numbers[place]
                prompt, answer = self.prompts[number], self.answers[number]
                tokens = np.concatenate([prompt, answer])
                end = start + len(tokens) - 1
                slots = slice(start + len(prompt) - 1, end)
                ids['tokens'][row, start:end], ids['targets'][row, start:end] = tokens[:-1], tokens[1:]
                ids['positions'][row, start:end] = np.arange(end - start)
                ids['segment_ids'][row, start:end] = segment
                for name in made.keys() - {'weights'}:
                    made[name][row, slots] = getattr(self, name)[number]
                each = 1.0 / len(answer) if algorithm.weights == 'sequence' else 1.0
                made['weights'][row, slots] = each
                lengths[row, segment - 1] = len(answer)
                counts[row] += {
                    'token': len(answer), 'sequence': 1, 'constant': shape.max_new_tokens
                }[algorithm.weights]  # fmt: skip
                places.append((number, row, slots))
                start = end
        reported = np.full(num_rows, counts.sum() / lengths.sum(), np.float32)
        beta = np.full(num_rows, self.beta, np.float32)
        return PolicyBatch(
            **ids, **made, lengths=lengths, counts=counts, reported=reported, beta=beta
        ), places


def _rows(lengths: Sequence[int], shape: Shape) -> list[list[int]]:
    """What stands together in a row."""
    bins, most = best_fit(lengths, shape.seq_len), shape.most_in_row
    return [one[start : start + most] for one in bins for start in range(0, len(one), most)]
