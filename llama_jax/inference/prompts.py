"""What a model is given to read: prompts, as texts or as token ids."""

from collections.abc import Sequence

from llama_jax.models.config import LlamaConfig
from llama_jax.tokenizer.protocol import Tokenizer, prompt_ids, required
from llama_jax.types import InputError

# A text, or its token ids.
Prompt = str | Sequence[int]


def ids_of(
    tokenizer: Tokenizer | None, prompts: Sequence[Prompt], special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of each prompt; see `prompt_ids`.

    Raises:
      InputError: one is a text, and there is no tokenizer.
    """
    return [
        prompt_ids(required(tokenizer), prompt, special_tokens) if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]


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
