"""What a model is given to read, refused in one line where it is not [B, T] ids of the model's own."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig


def check_tokens(tokens: Any, config: LlamaConfig, *, may_be_long: bool, **beside: Any) -> None:
    """Refuses what is no [B, T] of ids, rows beyond the context, and ids that have no row, where they are known.

    Args:
      tokens: as they were given.
      config: of the model.
      may_be_long: rows may go on where another one ended.
      beside: what must have the shape of `tokens`, by name; None is left out.
    """
    if not hasattr(tokens, 'shape'):
        raise InputError(
            f'tokens are a {type(tokens).__name__}; give an array of ids [B, T], as by jnp.asarray(tokens)'
        )
    if len(tokens.shape) != 2:
        one = '; of a single row make tokens[None]' if len(tokens.shape) == 1 else ''
        raise InputError(f'tokens have the shape {tokens.shape}; they must be ids [B, T], a row each{one}')
    if not tokens.shape[0]:
        raise InputError(f'tokens have the shape {tokens.shape}; give at least one row')
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f'tokens are {tokens.dtype}; they must be integers, the ids that a tokenizer gives')
    for name, array in beside.items():
        if array is not None and jnp.shape(array) != tokens.shape:
            raise InputError(
                f'{name} have the shape {jnp.shape(array)}, tokens {tokens.shape}; give one for each token'
            )
    if not may_be_long and tokens.shape[1] > config.max_seq_len:
        raise InputError(
            f'tokens have {tokens.shape[1]} columns, the context of the model is {config.max_seq_len}; give fewer, or '
            f'ask for a longer one by dataclasses.replace(config, max_seq_len={tokens.shape[1]})'
        )
    is_known = not isinstance(tokens, Tracer) and getattr(tokens, 'is_fully_addressable', True)
    if not is_known or not tokens.size:
        return
    known = np.asarray(tokens)  # under a trace, too, where the ids are a constant of it
    for token in (known.min(), known.max()):
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f'tokens hold the id {token}; the model has ids from 0 to {config.vocab_size - 1}, so give those of '
                'the tokenizer that its weights were trained with'
            )
