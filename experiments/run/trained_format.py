"""How a checkpoint is asked: in the format that it was trained with."""

import logging

from experiments.run.record import recorded_config
from llama_jax import pretrained
from llama_jax.tokenizer.chat_format import ChatFormat, chat_format_for, format_with
from llama_jax.tokenizer.protocol import Tokenizer

logger = logging.getLogger('llama_jax.trained_format')


def chat_format_of(opened: pretrained.Checkpoint, tokenizer: Tokenizer, given: str) -> ChatFormat:
    """The format that is given by name, or that of the checkpoint's run, of its template, of its tokenizer's family.

    The run's is what its record says; what was converted from one has the template of its format.

    Raises:
      InputError: there is no such format, or the tokenizer lacks its special tokens.
    """
    trained = {} if given else recorded_config(opened) or {}
    if 'data.format' in trained:
        name = trained['data.format']
        logger.info(
            '%s: prompts are spelled as in its training: %s', opened.path, name or "its family's format"
        )
        return chat_format_for(tokenizer, name)
    by_template = None if given else format_with(tokenizer, opened.template)
    return by_template or chat_format_for(tokenizer, given)
