"""Who proposes tokens that a model then verifies several at a time (`inference.speculative`)."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.inference.sampling import SamplerRows, count_drawn, draw_tokens, row_key
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.types import Params

# Tokens of a row's end that are looked for in it: the longer what is found, the likelier it goes on alike.
_LONGEST_MATCH = 6


@flax.struct.dataclass
class Heard:
    """What rows have come to, for those who propose how they go on.

    Attributes:
      tokens: of prompt and completion; what lies behind `last` means nothing.
      last: place of the newest token in `tokens`, the one that no model has read.
      step: number of the token that comes next.
      seen: see `sampling.seen_in_prompts`.
      settings: of the rows.
    """

    tokens: Int[Array, 'B S']
    last: Int[Array, 'B']
    step: Int[Array, 'B']
    seen: Int[Array, 'B V'] | None
    settings: SamplerRows


@flax.struct.dataclass
class Proposal:
    """How rows might go on.

    Attributes:
      tokens: one after the other.
      logits: of the distributions that they were drawn from, by `draw_proposal`; None where they were not drawn.
    """

    tokens: Int[Array, 'B k']
    logits: Float[Array, 'B k V'] | None = None


@runtime_checkable
class Proposer(Protocol):
    """Who proposes how rows go on; a pytree."""

    num_tokens: int

    def propose(self, cache: KVCache, heard: Heard) -> tuple[KVCache, Proposal]:
        """`num_tokens` tokens a row, and the cache of what it has read, if it is a model: else one of no layers."""
        ...


@flax.struct.dataclass
class Lookup:
    """Proposes what followed in the row itself where it read as it does at its end: good where texts are copied.

    Attributes:
      num_tokens: proposed at once.
    """

    num_tokens: int = flax.struct.field(pytree_node=False, default=4)

    def propose(self, cache: KVCache, heard: Heard) -> tuple[KVCache, Proposal]:
        """The continuation of the longest match of the row's end, the latest of several.

        Where it would go on behind the newest token the row repeats itself, and so does the proposal. Where nothing
        matches something is proposed all the same.
        """
        tokens, last = heard.tokens, heard.last[:, None]
        places = jnp.arange(tokens.shape[1])[None]
        is_equal, length = True, jnp.zeros_like(tokens)
        for back in range(_LONGEST_MATCH):
            wanted = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1)
            is_equal &= (jnp.roll(tokens, back, axis=1) == wanted) & (places >= back)
            length += is_equal
        length = jnp.where(places < last, length, -1)
        # The latest of the longest: the place from behind at which it is first.
        found = length.shape[1] - 1 - jnp.argmax(length[:, ::-1], axis=1)[:, None]
        period = jnp.maximum(last - found, 1)
        following = found + 1 + jnp.arange(self.num_tokens)[None] % period
        return cache, Proposal(jnp.take_along_axis(tokens, jnp.minimum(following, last), axis=1))


@flax.struct.dataclass
class Draft:
    """Proposes what a cheaper Llama of the same tokens draws, one after the other.

    Attributes:
      model: with whole rows.
      params: its weights, of layers apart.
      num_tokens: proposed at once.
    """

    model: LlamaForCausalLM = flax.struct.field(pytree_node=False)
    params: Params
    num_tokens: int = flax.struct.field(pytree_node=False, default=4)

    def propose(self, cache: KVCache, heard: Heard) -> tuple[KVCache, Proposal]:
        """As many tokens as it takes steps.

        The first step reads the two newest tokens: the one before the newest may be the last that it proposed, which
        it has not read. What else it has read is the row's, or is overwritten.
        """
        places = jnp.maximum(heard.last - 1, 0)
        newest = jnp.take_along_axis(heard.tokens, places[:, None] + jnp.arange(2)[None], axis=1)
        logits, cache = self._read(dataclasses.replace(cache, length=places), newest)

        def step(carry: tuple, number: Array) -> tuple[tuple, tuple[Array, Array]]:
            logits, cache, seen = carry
            token, law = draw_proposal(heard.settings, logits, heard.step + number, seen)
            seen = None if seen is None else count_drawn(seen, token)
            return (*self._read(cache, token[:, None]), seen), (token, law)

        numbers = jnp.arange(self.num_tokens)
        (logits, cache, seen), drawn = jax.lax.scan(step, (logits, cache, heard.seen), numbers[:-1])
        last = draw_proposal(heard.settings, logits, heard.step + numbers[-1], seen)
        tokens, laws = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), drawn, last)
        return cache, Proposal(tokens.T, laws.transpose(1, 0, 2))

    def _read(self, cache: KVCache, tokens: Int[Array, 'B T']) -> tuple[Float[Array, 'B V'], KVCache]:
        logits, written = self.model.apply({'params': self.params}, tokens, cache=cache)
        assert isinstance(written, KVCache)
        return logits[:, -1], written


def draw_proposal(
    settings: SamplerRows, logits: Float[Array, 'B V'], step: Int[Array, 'B'], seen: Int[Array, 'B V'] | None
) -> tuple[Int[Array, 'B'], Float[Array, 'B V']]:
    """A token a row of what a cheaper model thinks, and the logits of the distribution that it was drawn from.

    Args:
      settings: of the rows: asking the same of both models makes them agree more often.
      logits: of the cheaper model.
      step: number of the token.
      seen: see `sampling.seen_in_prompts`.
    """
    logits = settings.filter(settings.adjust(logits.astype(jnp.float32), seen, step))
    return draw_tokens(draft_keys(settings, step)[:, 0], logits), logits


def draft_keys(settings: SamplerRows, step: Int[Array, 'B']) -> Any:
    """Of each row and token: to propose it with, to accept it with, and to draw another with."""
    return jax.vmap(lambda *of: jax.random.split(row_key(*of), 3))(settings.seed, settings.stream, step)
