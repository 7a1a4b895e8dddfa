"""Segments of rows that hold contexts and several continuations of each: what a query sees beside its own segment.

Asked for as an implementation of attention (`inference.scoring` does, and pairs whose prompts stand once), because to
all others a segment sees nothing but itself.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# The segment of the first context of a row; the next has one less. Its continuations are of the segments from 1 on,
# those of the next from 1 + _MOST on. What pads a row is of segment 0.
SHARED = -1
_MOST = 1 << 15


def segment_of(context: int, continuation: int) -> int:
    """The segment of a continuation, counted from 1, of a context, counted from 0."""
    assert 0 < continuation < _MOST, 'so many continuations fit no row'
    return context * _MOST + continuation


def context_of(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """The segment of the context that each continuation stands behind; of all else its own."""
    return jnp.where(segment_ids > 0, SHARED - segment_ids // _MOST, segment_ids)


def visible(q_segment_ids: Int[Array, 'B T'], kv_segment_ids: Int[Array, 'B S']) -> Bool[Array, 'B T S']:
    """Whether a query sees a key, but for their order: of its own segment, and of its context."""
    keys = kv_segment_ids[:, None, :]
    return (q_segment_ids[:, :, None] == keys) | (context_of(q_segment_ids)[:, :, None] == keys)


def unit_of(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """The number, from 1, of each context, and of it that of its continuations; 0 of padding."""
    return SHARED + 1 - context_of(segment_ids)
