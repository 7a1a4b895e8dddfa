"""Whether what is given as a model and as its weights are these, and belong together."""

from typing import Any

import jax

from llama_jax.errors import InputError
from llama_jax.models.llama import LlamaForCausalLM


def check_model(model: Any, params: Any) -> None:
    """Refuses what is no model, or no weights of this one, as far as its keys, its embedding and its layers tell.

    Args:
      model: as it was given.
      params: its weights in any representation, layers stacked or not, abstract ones too.
    """
    check_kinds(model, params)
    config, blocks = model.config, params['blocks']
    layers = len(blocks) if isinstance(blocks, tuple) else jax.tree.leaves(blocks)[0].shape[0]
    given = (*jax.tree.leaves(params['embed'])[0].shape, layers)
    if given != (config.vocab_size, config.embed_dim, config.num_layers):
        raise InputError(
            f'params are of another model: vocab_size, embed_dim and num_layers are {given[0]}, {given[1]} and '
            f"{layers}, the model's {config.vocab_size}, {config.embed_dim} and {config.num_layers}; load returns both"
        )


def check_kinds(model: Any, params: Any) -> None:
    """Refuses what is no model, and what is no weights of any."""
    if not isinstance(model, LlamaForCausalLM):
        raise InputError(
            f'the model is a {type(model).__name__}; give LlamaForCausalLM(config), then its weights'
        )
    wanted = 'give what load or init_params returned'
    if not isinstance(params, dict):
        raise InputError(f'params are a {type(params).__name__}; {wanted}')
    if 'embed' not in params or 'blocks' not in params:
        within = "; give what is within, params['params']" if 'params' in params else f'; {wanted}'
        raise InputError(
            f'params have the keys {sorted(map(str, params))[:8]}, those of a Llama embed and blocks{within}'
        )
