"""What a model is given to read: prompts, as texts or as token ids."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.tokenizer.protocol import Tokenizer, prompt_ids, required

# A text, or its token ids.
Prompt = str | Sequence[int] | np.ndarray
# One prompt that is a text, or any number of them.
Prompts = str | Iterable[Prompt]


def ids_of(tokenizer: Tokenizer | None, prompts: Prompts, special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each prompt; see `prompt_ids`.

    Raises:
      InputError: one is a text, and there is no tokenizer; or one is neither text nor ids.
    """
    if not isinstance(prompts, Iterable):
        raise InputError(
            f'prompts are {repr(prompts)[:60]}; give a text, or a list of texts or of lists of token ids'
        )
    return [
        prompt_ids(required(tokenizer), prompt, special_tokens)
        if isinstance(prompt, str)
        else _checked_ids(index, prompt)
        for index, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts)
    ]


def _checked_ids(index: int, prompt: Any) -> list[int]:
    if isinstance(prompt, int | np.integer):
        raise InputError(
            f'prompt {index} is the number {prompt}; a prompt is a text or a list of token ids, so give the ids of one '
            'prompt as [[...]]'
        )
    try:
        if isinstance(prompt, bytes | bytearray):
            raise TypeError  # its numbers are no ids
        return list(map(operator.index, prompt))
    except TypeError:
        raise InputError(
            f'prompt {index} is {repr(prompt)[:60]}; a prompt is a text or a list of token ids (whole numbers)'
        ) from None


def check_prompts(prompts: Sequence[Sequence[int]], config: LlamaConfig, new_tokens: int = 1) -> None:
    """Refuses what the model cannot read.

    Args:
      prompts: token ids.
      config: of the model.
      new_tokens: that the context is to have room for behind each.

    Raises:
      InputError: a prompt is empty or too long, or holds what is no token of the model.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f'prompt {index} has no token; begin it with the BOS token')
        if len(prompt) > (most := config.max_seq_len - new_tokens):
            raise InputError(
                f'prompt {index} has {len(prompt)} tokens; the model reads {config.max_seq_len}, so shorten it to at '
                f'most {most}'
            )
        if min(prompt) < 0:
            raise InputError(f'prompt {index} holds {min(prompt)}; token ids are 0 or more')
        if (largest := max(prompt)) >= config.vocab_size:
            raise InputError(
                f'prompt {index} holds token {largest}, for which the model has no row: it has {config.vocab_size}; '
                'give the tokenizer that the weights were trained with'
            )
