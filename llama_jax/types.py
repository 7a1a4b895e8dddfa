"""The structs that flow between rooms, and the legend of axis letters.

Shapes stand in signatures as jaxtyping strings. One letter means the same thing in the whole code base:

    B batch      T query length   S key length     D embed      F mlp          V vocab
    N query heads   K kv heads    G = N / K        H head_dim   L layers
    P pairs of answers in a row, or answers that were drawn

The annotations are checked (by beartype) in tests only; in production they cost nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from llama_jax.errors import InputError, did_you_mean

Array = jax.Array
PyTree = Any
Params = dict[str, Any]  # a plain nested dict of arrays

_SHORT_DTYPES = {'bf16': 'bfloat16', 'fp16': 'float16', 'fp32': 'float32'}


def float_dtype(dtype: Any) -> np.dtype:
    """The floating-point type of a name ('float32', 'bfloat16', 'float16', or 'fp32', 'bf16', 'fp16'), or as it is.

    Raises:
      InputError: no such type has that name.
    """
    if not isinstance(dtype, str):
        return np.dtype(dtype)
    name = _SHORT_DTYPES.get(dtype, dtype)
    if name not in _SHORT_DTYPES.values():
        names = [*_SHORT_DTYPES.values(), *_SHORT_DTYPES]
        raise InputError(
            f'dtype {dtype!r} is no floating-point type of weights; {did_you_mean(dtype, names)}'
        )
    return jax.numpy.dtype(name)


@runtime_checkable
class LazyArray(Protocol):
    """A weight that stays in its file until a block of it is read, by any number of threads.

    Attributes:
      shape: of the whole.
      dtype: of the blocks.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of what is read."""
        ...

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The block of these slices, one an axis, each of step 1. It may be read-only."""
        ...


@flax.struct.dataclass
class LMBatch:
    """Packed rows for next-token prediction, in NumPy on the host and JAX arrays on the devices.

    Attributes:
      tokens: what the model reads.
      targets: `targets[b, t]` is the token that follows `tokens[b, t]`.
      positions: place of each token in its own document piece, from 0; what RoPE rotates by.
      segment_ids: which document of the row a token belongs to, from 1; 0 is padding.
      loss_mask: 1 where the target counts, 0 across document ends and in padding.
    """

    tokens: Int[Any, 'B T']
    targets: Int[Any, 'B T']
    positions: Int[Any, 'B T']
    segment_ids: Int[Any, 'B T']
    loss_mask: Bool[Any, 'B T']

    @classmethod
    def abstract(cls, batch_size: int, seq_len: int, sharding: Any) -> 'LMBatch':
        """Shapes, dtypes and the sharding that all arrays have, without memory."""
        ids, mask = (
            jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=sharding)
            for dtype in (np.int32, np.bool_)
        )
        return cls(ids, ids, ids, ids, mask)


@flax.struct.dataclass
class PreferenceBatch:
    """Packed rows that hold whole pairs of answers, of which people preferred one, or judged one alone.

    An answer stands behind its prompt in a segment of its own, or behind a prompt that several share (`share_prompt` of
    `data.preferences`). Nothing follows from padding: what is compared is named, and where its score stands.

    Attributes:
      tokens: what the model reads.
      targets: `targets[b, t]` is the token that follows `tokens[b, t]`.
      positions: place of each token in its own prompt and answer, from 0; what RoPE rotates by.
      segment_ids: which sequence of the row a token belongs to, from 1; 0 is padding.
      loss_mask: 1 where the target is of an answer, stop tokens included; 0 in prompts and what others say in between.
      format_mask: 1 at those of them that are form and not words, such as stop tokens.
      pairs: segments of the preferred answer and of the other one. 0 stands for none: both where there is no pair, one
        where the other was judged alone.
      ends: slots of the last tokens of these, where they are scored.
      margins: how much better the first is, in the data's unit.
      weights: of the pairs; 0 where there is none.
      safe: 1 where an answer is known to be safe, 0 where it is known not to be, -1 else.
      reference: log-probabilities of these answers under the reference, where they were computed before; else 0.
      baseline: what KTO compares a row's answers with; else 0.
    """

    tokens: Int[Any, 'B T']
    targets: Int[Any, 'B T']
    positions: Int[Any, 'B T']
    segment_ids: Int[Any, 'B T']
    loss_mask: Bool[Any, 'B T']
    format_mask: Bool[Any, 'B T']
    pairs: Int[Any, 'B P 2']
    ends: Int[Any, 'B P 2']
    margins: Float[Any, 'B P']
    weights: Float[Any, 'B P']
    safe: Int[Any, 'B P 2']
    reference: Float[Any, 'B P 2']
    baseline: Float[Any, ' B']

    @classmethod
    def abstract(
        cls, batch_size: int, seq_len: int, num_pairs: int, sharding: Any, row_sharding: Any
    ) -> 'PreferenceBatch':
        """Shapes, dtypes and shardings, without memory.

        Args:
          batch_size: B.
          seq_len: T.
          num_pairs: P, the most that a row holds.
          sharding: of arrays [B, T].
          row_sharding: of the others, whose first axis alone is split.
        """

        def leaf(dtype, *shape):
            placed = sharding if shape == (seq_len,) and dtype in (np.int32, np.bool_) else row_sharding
            return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=placed)

        ids, mask = leaf(np.int32, seq_len), leaf(np.bool_, seq_len)
        named, number = leaf(np.int32, num_pairs, 2), leaf(np.float32, num_pairs)
        answers = leaf(np.float32, num_pairs, 2)
        return cls(
            ids, ids, ids, ids, mask, mask, named, named, number, number, named, answers, leaf(np.float32)
        )


@flax.struct.dataclass
class PolicyBatch:
    """Packed rows of a prompt and an answer that was drawn for it, each pair of them in a segment of its own.

    What an answer was worth, and how much each token counts, are numbers here: so algorithms differ in data.

    Attributes:
      tokens: what the model reads.
      targets: `targets[b, t]` is the token that follows `tokens[b, t]`.
      positions: place of each token in its own prompt and answer, from 0; what RoPE rotates by.
      segment_ids: which pair of the row a token belongs to, from 1; 0 is padding.
      weights: of the target in the loss; 0 where it is of no answer.
      advantages: of the target, in units of reward.
      old: log-probability of the target under the policy that it was drawn from, at the sampling temperature.
      reference: the same under the reference.
      importance: what a token's loss is multiplied by, where the sampler had other probabilities than `old`; else 1.
      values: what was expected before the target, when it was drawn.
      returns: what came of it.
      lengths: targets that count, of each segment from 1.
      counts: what a row adds to the number that the loss is divided by.
      reported: what each token that counts weighs in figures: divided by that number they are means over tokens.
      beta: weight of a divergence from the reference in the loss.
    """

    tokens: Int[Any, 'B T']
    targets: Int[Any, 'B T']
    positions: Int[Any, 'B T']
    segment_ids: Int[Any, 'B T']
    weights: Float[Any, 'B T']
    advantages: Float[Any, 'B T']
    old: Float[Any, 'B T']
    reference: Float[Any, 'B T']
    importance: Float[Any, 'B T']
    values: Float[Any, 'B T']
    returns: Float[Any, 'B T']
    lengths: Int[Any, 'B P']
    counts: Float[Any, ' B']
    reported: Float[Any, ' B']
    beta: Float[Any, ' B']

    @classmethod
    def abstract(
        cls, batch_size: int, seq_len: int, num_answers: int, sharding: Any, row_sharding: Any
    ) -> 'PolicyBatch':
        """Shapes, dtypes and shardings, without memory.

        Args:
          batch_size: B.
          seq_len: T.
          num_answers: P, the most that a row holds.
          sharding: of arrays [B, T].
          row_sharding: of the others, whose first axis alone is split.
        """
        ids, number = (
            jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=sharding)
            for dtype in (np.int32, np.float32)
        )
        lengths = jax.ShapeDtypeStruct((batch_size, num_answers), np.int32, sharding=row_sharding)
        of_row = jax.ShapeDtypeStruct((batch_size,), np.float32, sharding=row_sharding)
        fields = dict.fromkeys(('tokens', 'targets', 'positions', 'segment_ids'), ids)
        fields |= dict.fromkeys(('counts', 'reported', 'beta'), of_row) | {'lengths': lengths}
        others = (field.name for field in dataclasses.fields(cls) if field.name not in fields)
        return cls(**fields, **dict.fromkeys(others, number))


Metrics = dict[str, Float[Array, '']]

# (params, frozen, batch, rng) -> (sum of losses, sum of weights, further sums by name).
# Losses are sums: the division by the weight happens once, over the global batch and all its microbatches.
LossFn = Callable[[Params, PyTree, Any, Array], tuple[Float[Array, ''], Float[Array, ''], Metrics]]
