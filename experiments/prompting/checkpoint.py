"""--checkpoint as commands open it: with its tokenizer, in a type to compute in."""

import jax.numpy as jnp

from llama_jax import pretrained
from llama_jax.errors import InputError
from llama_jax.models.llama import compute_dtype

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float16': jnp.float16}


def dtype_name(given: str) -> str:
    """--dtype as it is given; auto is what suits the device."""
    return jnp.dtype(compute_dtype()).name if given == 'auto' else given


def open_with_tokenizer(checkpoint: str, tokenizer: str) -> pretrained.Checkpoint:
    """--checkpoint opened, for a command that reads or writes text; its weights are still in their files.

    Raises:
      InputError: it has no tokenizer, and --tokenizer gives none; or as `pretrained.open`.
    """
    opened = pretrained.open(checkpoint)
    check_tokenizer(opened, tokenizer)
    return opened


def check_tokenizer(opened: pretrained.Checkpoint, tokenizer: str) -> None:
    """Raises InputError where a checkpoint has no tokenizer, and --tokenizer gives none."""
    if not tokenizer and opened.tokenizer is None:
        raise InputError(
            f'{opened.path} has no tokenizer; give the one that the weights were trained with by --tokenizer'
        )
