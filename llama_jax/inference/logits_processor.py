"""What changes the model's logits within the program that draws from them: the caller's own rules."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Logits, the tokens of each row so far (its prompt's first; zeros behind them), and how many they are -> logits.
OfTokens = Callable[[Float[Array, 'B V'], Int[Array, 'B S'], Int[Array, 'B']], Float[Array, 'B V']]


@runtime_checkable
class LogitsProcessor(Protocol):
    """Gives the logits that bias, penalties, temperature and filters see; log-probabilities by the model stay its own.

    Its methods but `begin` are traced, once for each object: it is hashable, and the same one is given again and again.
    What it knows of a row is that row's state, which goes through the program from token to token: the state of an
    automaton, say. What only the host can tell is for a `RuledProcessor`.
    """

    def begin(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Any:
        """States of rows that begin: a tree of NumPy arrays with the rows as their first axis.

        Args:
          prompts: token ids of each row.
          num_tokens: that a row may come to have, a power of two.
        """
        ...

    def __call__(self, logits: Float[Array, 'B V'], state: Any) -> Float[Array, 'B V']:
        """Logits to go on with; those of what may not come are -inf, of at least one token not."""
        ...

    def advance(self, state: Any, tokens: Int[Array, 'B']) -> Any:
        """The states after a token more of each row."""
        ...


@runtime_checkable
class Follower(Protocol):
    """Follows one answer on the host, from its beginning."""

    def hear(self, token: int) -> None:
        """The next token of the answer."""
        ...


@runtime_checkable
class RuledProcessor(LogitsProcessor, Protocol):
    """One that each request may give a rule of its own, kept to on the host: while one runs, steps are made one by one.

    The state of rows comes from the host anew for every step, so that programs are arrays in, arrays out: they run on
    any mesh, and stay in the compilation cache, which keeps none that calls back.
    """

    def follow(self, rule: Any) -> Follower | None:
        """What follows an answer with this rule, or None, at its beginning; None where it has none to keep to."""
        ...

    def states(self, rows: Sequence[Any]) -> Any:
        """As `begin`, of rows that these follow; None: a row without a rule."""
        ...


@dataclasses.dataclass(frozen=True)
class ByTokens:
    """A processor that a function of all tokens so far makes."""

    function: OfTokens

    def begin(
        self, prompts: Sequence[Sequence[int]], num_tokens: int
    ) -> tuple[Int[np.ndarray, 'B S'], Int[np.ndarray, 'B']]:
        """The prompts [B, S] with room for what follows, and their lengths [B]."""
        tokens = np.zeros((len(prompts), num_tokens), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        return tokens, np.array([len(prompt) for prompt in prompts], np.int32)

    def __call__(self, logits: Float[Array, 'B V'], state: Any) -> Float[Array, 'B V']:
        """The function's logits."""
        return self.function(logits, *state)

    def advance(self, state: Any, tokens: Int[Array, 'B']) -> Any:
        """The tokens, each behind its row's."""
        so_far, lengths = state
        return so_far.at[jnp.arange(len(tokens)), lengths].set(tokens, mode='drop'), lengths + 1


def as_processor(given: LogitsProcessor | OfTokens | None) -> LogitsProcessor | None:
    """What a program takes, of what a caller gives."""
    return given if given is None or isinstance(given, LogitsProcessor) else ByTokens(given)
