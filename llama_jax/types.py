"""The structs that flow between rooms, and the legend of axis letters.

Shapes stand in signatures as jaxtyping strings. One letter means the same thing in the whole code base:

    B batch      T query length   S key length     D embed      F mlp          V vocab
    N query heads   K kv heads    G = N / K        H head_dim   L layers

The annotations are checked (by beartype) in tests only; in production they cost nothing.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array
PyTree = Any
Params = dict[str, Any]  # a plain nested dict of arrays


class InputError(ValueError):
    """Something the user gave is wrong; the message is the one line that they read.

    It says what is wrong, the value, what is allowed and what to do. Commands print it and exit with status 2;
    every other exception is a defect of ours and keeps its traceback.
    """


class SystemFailure(Exception):
    """The system failed while work was under way: a full disk, a quota, a device; the message is the one line.

    Commands print it and exit with status 1. What was finished before stays, and the same command goes on from there.
    """


@contextlib.contextmanager
def refusals_of(origin: object) -> Iterator[None]:
    """What is refused within is said of `origin`: a file or folder whose content was looked at without its name.

    Raises:
      InputError: with `origin` in front.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f'{origin}: {error}') from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'did you mean a or b?', each name once; where none is near, all that there are."""
    names = list(dict.fromkeys(known))
    begun = sorted((n for n in names if name and n.startswith(name)), key=len)
    near = list(dict.fromkeys([*begun, *difflib.get_close_matches(name, names, n=3, cutoff=0.5)]))[:3]
    return f'did you mean {" or ".join(near)}?' if near else f'there are {", ".join(sorted(names))}'


def error_line(error: BaseException) -> str:
    """What a library's error says, short enough to be the reason within a line of ours; its type where it is silent."""
    lines = filter(None, map(str.strip, str(error).splitlines()))
    line = next(lines, type(error).__name__)[:300]
    return ''.join(letter if letter.isprintable() else '\ufffd' for letter in line)


@runtime_checkable
class LazyArray(Protocol):
    """A weight that stays in its file until a block of it is read, by any number of threads.

    Attributes:
      shape: of the whole.
      dtype: of the blocks.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

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


Metrics = dict[str, Float[Array, '']]

# (params, frozen, batch, rng) -> (sum of losses, sum of weights, further sums by name).
# Losses are sums: the division by the weight happens once, over the global batch and all its microbatches.
LossFn = Callable[[Params, PyTree, Any, Array], tuple[Float[Array, ''], Float[Array, ''], Metrics]]
