"""What is asked for one prompt, and what is told of it while it is answered."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llama_jax.errors import InputError
from llama_jax.inference.batcher import Ended
from llama_jax.inference.sampling import Sampler
from llama_jax.inference.scoring import TokenScore


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """What is asked for one prompt.

    Attributes:
      tokens: of the prompt, at least one.
      max_new_tokens: at most this many follow, and no more than the context has room for.
      sampler: chooses them.
      stop_ids: tokens that end it.
      stream: tells requests of one seed apart.
      is_complete: the new tokens so far -> whether they are enough, asked at each.
      key: whose it is; keys take turns.
      like: number of a request before it with the same prompt and key, which is read once.
      rule: of its own, for a processor that takes rules (`RuledProcessor`); None: none.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    sampler: Sampler = Sampler()
    stop_ids: Sequence[int] = ()
    stream: int = 0
    is_complete: Callable[[list[int]], bool] | None = None
    key: str = ''
    like: int | None = None
    rule: Any = None


# Of a row that only fills up a shape.
NOTHING = CompletionRequest((0,), 1)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a request was given since the last.

    Attributes:
      number: of the request, as `submit` gave it.
      tokens: new ones, without a stop token.
      stop_id: the stop token that ended it.
      scores: of the tokens and the stop token, if the generator gives any.
      ended: None while it goes on.
    """

    number: int
    tokens: list[int]
    stop_id: int | None = None
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    ended: Ended | None = None


def check_number(name: str, number: Any) -> None:
    """Refuses what is no number of tokens or completions; `name` begins the line."""
    if isinstance(number, bool) or not hasattr(number, '__index__') or number < 1:
        raise InputError(f'{name} is {number!r}; it must be at least 1, a whole number')


def ends_of(stop: str | Iterable[str], stop_ids: Iterable[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The texts and the tokens that end a completion, as somebody gives them.

    Raises:
      InputError: they are something else.
    """
    texts: Any = (stop,) * bool(stop) if isinstance(stop, str) else stop
    texts = tuple(texts) if isinstance(texts, Iterable) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f'stop is {repr(stop)[:60]}; give a text, or a list of texts')
    try:
        ids = tuple(map(operator.index, stop_ids))
    except TypeError:
        raise InputError(f'stop_ids are {repr(stop_ids)[:60]}; give a list of token ids') from None
    if min(ids, default=0) < 0:
        raise InputError(f'stop_ids hold {min(ids)}; token ids are 0 or more')
    return texts, ids
