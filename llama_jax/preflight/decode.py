"""One step of generation: a token more for every row, weights as they are kept for it, the cache split like them."""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.inference import decoding
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import LlamaForCausalLM, abstract_params, param_axes
from llama_jax.models.unstacked import unstack
from llama_jax.preflight.report import device_bytes
from llama_jax.quantize.forms import choose_forms, name_of, represent_all
from llama_jax.types import Array, Params


def decode_step(model: LlamaForCausalLM) -> Any:
    """Jitted (params, cache, tokens [B]) -> (next tokens [B], cache): greedy `generate`'s step, the cache donated."""

    def step(params: Params, cache: KVCache, tokens: Array) -> tuple[Array, KVCache]:
        logits, read = decoding.decode_step(model, params, cache, tokens)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), read

    return jax.jit(step, donate_argnums=1)


def decode_arguments(
    model: LlamaForCausalLM, batch_size: int, length: int, weights: str | None = None
) -> tuple[Params, KVCache, Any]:
    """Abstract arguments of `decode_step` with their shardings, the weights of layers apart.

    Args:
      model: with a partitioner.
      batch_size: rows that are generated at once.
      length: tokens that the cache has room for.
      weights: what `quantize` makes of them, a key of `ops.quantized.CODE_MAX`; None: the type of the computation.
    """
    partitioner = model.partitioner
    assert partitioner is not None
    params = abstract_params(model)
    shardings = partitioner.tree_shardings(params, param_axes(model))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings,
    )
    if weights is not None:
        shapes = {name_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
        params = represent_all(params, choose_forms(shapes, weights)[0])
    params = unstack(params, model.dtype)
    of_cache = model.cache_dtype, model.dtype, partitioner
    cache = jax.eval_shape(lambda: KVCache.chosen(model.config, batch_size, length, *of_cache))

    def placed(leaf: Any, axes: tuple[str | None, ...], name: str) -> Any:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=partitioner.sharding(axes, leaf.shape, name)
        )

    cache = cache.map(lambda leaf: placed(leaf, cache.axes, 'cache'))
    cache = cache.replace(length=placed(cache.length, ('batch',), 'lengths of the cache'))
    tokens = placed(jax.ShapeDtypeStruct((batch_size,), jnp.int32), ('batch',), 'tokens')
    return params, cache, tokens


def bytes_to_read(params: Params, cache: KVCache) -> int:
    """What no step can do without reading on one device: weights as they are stored, and the cache, when it is full.

    Of an embedding that is not the head as well, a step reads the rows of its tokens, which are next to nothing.
    """
    weights = {name: leaf for name, leaf in params.items() if name != 'embed' or 'head' not in params}
    return device_bytes((weights, cache.arrays))
