"""Which tokens may be drawn: logits by row with -inf for the others, found exactly and without a sort."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt


def keep_top_k(logits: Float[Array, 'B V'], top_k: Int[Array, 'B']) -> Float[Array, 'B V']:
    """Tokens at least as likely as the `top_k`-th."""
    smallest = _largest(logits, lambda is_kept: jnp.sum(is_kept, axis=-1) >= top_k)
    return jnp.where(logits >= smallest[:, None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, 'B V'], top_p: Float[Array, 'B']) -> Float[Array, 'B V']:
    """Tokens before which the more likely ones do not exceed `top_p`; the one that crosses it stays."""
    # Whole numbers of 2^-30 have one sum, whatever the order in which they are added.
    mass = jnp.round(jax.nn.softmax(logits, axis=-1) * 2.0**30).astype(jnp.int32)
    allowed = (top_p * 2.0**30).astype(jnp.int32)

    def total(is_counted: Array) -> Array:
        return jnp.sum(jnp.where(is_counted, mass, 0), axis=-1)

    last = _largest(logits, lambda is_kept: total(is_kept) > allowed)[:, None]
    last = jnp.where((top_p < 1)[:, None], last, -jnp.inf)
    is_last, is_above = logits == last, logits > last
    # All above `last` stay, and of those as likely as it the first, as many as it takes.
    each = jnp.max(jnp.where(is_last, mass, 1), axis=-1)
    wanted = (allowed - total(is_above)) // jnp.maximum(each, 1) + 1
    wanted = jnp.where(top_p < 1, wanted, logits.shape[-1])
    is_split = jnp.any(jnp.sum(is_last, axis=-1) > wanted)
    is_last = jax.lax.cond(
        is_split, lambda: is_last & (jnp.cumsum(is_last, axis=-1) <= wanted[:, None]), lambda: is_last
    )
    return jnp.where(is_above | is_last, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, 'B V'], min_p: Float[Array, 'B']) -> Float[Array, 'B V']:
    """Tokens at least `min_p` times as likely as the most likely one."""
    ratio = logits - jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(ratio >= jnp.log(min_p)[:, None], logits, -jnp.inf)


def keep_best(logits: Float[Array, 'B V'], is_greedy: Bool[Array, 'B']) -> Float[Array, 'B V']:
    """The most likely token alone, the smallest id of several, in greedy rows."""
    best = jnp.arange(logits.shape[-1])[None] == most_likely(logits)[:, None]
    return jnp.where(best | ~is_greedy[:, None], logits, -jnp.inf)


def most_likely(logits: Float[Array, 'B V']) -> Int[Array, 'B']:
    """The token of each row with the largest logit, the smallest id of several.

    `jnp.argmax` is this with ten times the time on a CPU, which compares pairs one after the other on one core.
    """
    ids, size = jnp.arange(logits.shape[-1])[None], logits.shape[-1]
    is_best = logits == jnp.max(logits, axis=-1, keepdims=True)
    # Of a row with NaN none is the largest; the last id stands for it, which is one of the vocabulary.
    return jnp.min(jnp.where(is_best, ids, size - 1), axis=-1).astype(jnp.int32)


def _largest(
    logits: Float[Array, 'B V'], is_enough: Callable[[Bool[Array, 'B V']], Bool[Array, 'B']]
) -> Float[Array, 'B']:
    """The largest number of each row at which `is_enough` of what is not below it; -inf where there is none.

    It is found exactly, one bit of its place among all fp32 numbers at a time.
    """

    def choose_bit(index: Array, place: UInt[Array, 'B']) -> UInt[Array, 'B']:
        higher = place | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(is_enough(logits >= _number(higher)[:, None]), higher, place)

    place = jax.lax.fori_loop(0, 32, choose_bit, jnp.zeros(len(logits), jnp.uint32))
    return _number(jnp.maximum(place, jnp.uint32(0x007FFFFF)))  # the place of -inf; before it are no numbers


def _number(place: UInt[Array, 'B']) -> Float[Array, 'B']:
    """fp32 numbers by their place: those with a sign, the most negative first, then those without."""
    sign = jnp.uint32(2**31)
    return jax.lax.bitcast_convert_type(jnp.where(place >= sign, place ^ sign, ~place), jnp.float32)
