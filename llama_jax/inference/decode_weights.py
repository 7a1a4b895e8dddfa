"""The weights that a step of decoding reads, made once for each tree of params that is generated with."""

import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.models.unstacked import is_unstacked, unstack
from llama_jax.types import Params

# For as long as the arrays live that they were made of; the key is their identity.
_made: dict[tuple[Any, ...], tuple[list[weakref.ref], Params]] = {}


def decode_weights(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """The weights with arrays of each layer's own (`models.unstacked`), matrices in at most the width of `dtype`.

    Params that are unstacked already are given back. Others stay as they are and are in memory beside these, which are
    kept until an array of the params is gone, so that the next call finds them. To have one copy, unstack once and give
    that: `unstack(params, dtype, delete=True)`.
    """
    if is_unstacked(params):
        return params
    leaves = jax.tree.leaves(params)
    key = (jnp.dtype(dtype), *map(id, leaves))
    if key not in _made:
        forget = functools.partial(_forget, key)
        _made[key] = [weakref.ref(leaf, forget) for leaf in leaves], unstack(params, dtype)
    return _made[key][1]


def _forget(key: tuple[Any, ...], _: weakref.ref) -> None:
    _made.pop(key, None)
