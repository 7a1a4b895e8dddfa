"""Choosing the next token: greedy, temperature, top-k, top-p."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn; hashable, so that a compiled loop is made for it once.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep this many of the most likely tokens; 0 keeps all.
      top_p: keep the fewest most likely tokens whose probabilities reach this; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise InputError(f'temperature is {self.temperature}; it must be 0 (greedy) or more')
        if self.top_k < 0:
            raise InputError(f'top_k is {self.top_k}; it must be 0 (all tokens) or more')
        if not 0 < self.top_p <= 1:
            raise InputError(f'top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)')

    def __call__(self, logits: Float[Array, 'B V'], rng: Array) -> Int[Array, 'B']:
        """Draws one token a row. The filters see the distribution after temperature, as in Meta's generation code."""
        if self.temperature == 0.0:
            return jnp.argmax(logits, axis=-1)
        logits = logits.astype(jnp.float32) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            smallest = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        if self.top_p < 1.0:
            logits = jnp.where(_outside_top_p(logits, self.top_p), -jnp.inf, logits)
        return jax.random.categorical(rng, logits, axis=-1)


def _outside_top_p(logits: Float[Array, 'B V'], top_p: float) -> Bool[Array, 'B V']:
    """True for tokens to drop: those before which the more likely ones already exceed `top_p`.

    The token that crosses the threshold stays, so at least one always does.
    """
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.take_along_axis(before > top_p, jnp.argsort(order, axis=-1), axis=-1)
