"""What the layers of a model make of prompts."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.errors import InputError, checked_names
from llama_jax.inference import decoding
from llama_jax.inference.decode_weights import decode_weights
from llama_jax.inference.prompts import Prompts, check_prompts, ids_of
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.model_check import check_model
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params


@checked_names()
def hidden_states(
    model: LlamaForCausalLM,
    params: Params,
    tokenizer: Tokenizer | None,
    prompts: Prompts,
    *,
    layers: Sequence[int] = (-1,),
) -> list[Float[np.ndarray, 'layers T D']]:
    """The residual stream of each token of each prompt, at chosen depths, in fp32.

        (states,) = llama_jax.hidden_states(model, params, tokenizer, ['Once upon a time'], layers=[0, 2, -1])

    As `output_hidden_states` of transformers: 0 is the embedding, n what the n-th layer gives; after the last layer the
    final norm is applied. The prompts are read at once, as one batch.

    Args:
      model: see `generate`.
      params: its weights; as in `generate` a copy of each layer's own is kept beside them.
      tokenizer: that the weights were trained with; None where all prompts are ids.
      prompts: texts, or token ids; a string is one.
      layers: depths, in the order in which they are wanted; negative ones are counted from the end.

    Raises:
      InputError: a depth is none of the model's, or a prompt is empty or longer than the model's context.
    """
    check_model(model, params)
    depth = model.config.num_layers
    if wrong := [layer for layer in layers if not -depth - 1 <= layer <= depth]:
        raise InputError(
            f'layer {wrong[0]} is asked for; the model has {depth}, so it must be from 0 (the embedding) to {depth}, '
            f'or from -1 (the last) to {-depth - 1}'
        )
    ids = ids_of(tokenizer, prompts)
    check_prompts(ids, model.config, new_tokens=0)
    if not ids:
        return []
    model = decoding.with_whole_rows(model)
    shape = (
        decoding.rows_of(len(ids), model.partitioner),
        min(decoding.power_of_two(max(map(len, ids))), model.config.max_seq_len),
    )
    tokens = np.zeros(shape, np.int32)
    for row, prompt in zip(tokens, ids, strict=False):
        row[: len(prompt)] = prompt  # padding comes behind, and is not seen
    wanted = tuple(layer % (depth + 1) for layer in layers)
    weights = decode_weights(params, model.dtype)
    found = jax.device_get(_read(model, wanted, weights, decoding.place(tokens, model.partitioner)))
    return [found[:, row, : len(prompt)] for row, prompt in enumerate(ids)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
    model: LlamaForCausalLM, layers: tuple[int, ...], params: Params, tokens: Int[Array, 'B T']
) -> Float[Array, 'layers B T D']:
    (last, _), seen = model.apply({'params': params}, tokens, method='hidden', mutable='residual')
    states = [*seen['residual']['into_layer'], last]
    return decoding.readable(model, jnp.stack([states[layer].astype(jnp.float32) for layer in layers]))
