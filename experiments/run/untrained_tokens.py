"""A chat format's special tokens that the base never read: their rows begin as the mean of all, as new ones do."""

import dataclasses
import logging

from experiments.run.objective import Objective
from llama_jax.models.untrained_rows import fill_untrained, find_untrained
from llama_jax.tokenizer.chat_format import ChatFormat, Llama3ChatFormat
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params

_SPOKEN = ('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|eom_id|>', '<|python_tag|>')

logger = logging.getLogger('llama_jax.untrained_tokens')


def with_trained_tokens(objective: Objective, chat: ChatFormat, tokenizer: Tokenizer) -> Objective:
    """The objective, whose new runs begin with a row for each token of the format; says which had none.

    Tables that are frozen stay as they are, for the adapters' base is what its checkpoint says; a line tells of it.
    """
    special = getattr(tokenizer, 'special_tokens', {}) if isinstance(chat, Llama3ChatFormat) else {}
    ids = [special[name] for name in _SPOKEN if name in special]
    names = {id: name for name, id in special.items()}
    if not ids:
        return objective
    if frozen := find_untrained(objective.frozen, ids) if isinstance(objective.frozen, dict) else []:
        logger.warning(
            'the base never read %s, which this format needs, and its tables are frozen; train them by '
            '--config.lora.train_whole=embed,head',
            ' '.join(names[id] for id in frozen),
        )

    def first_params(target: Params) -> Params:
        params = objective.first_params(target)
        if untrained := find_untrained(params, ids):
            logger.info(
                'the base never read %s: their rows begin as the mean of all',
                ' '.join(names[id] for id in untrained),
            )
            params = fill_untrained(params, untrained)
        return params

    return dataclasses.replace(objective, first_params=first_params)
