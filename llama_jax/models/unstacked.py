"""Weights layer by layer, each an array of its own: what decoding reads at the memory's speed.

A checkpoint and training have one array for a weight of all layers, which a scan slices: in every step a copy of every
weight, as much as reading it twice more. Unstacked, `params['blocks']` is a tuple of the layers' trees; the model
takes either. It is a representation for as long as a program runs, never written to disk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.ops.linear import Representation
from llama_jax.ops.output_major import OutputMajorArray, by_outputs
from llama_jax.ops.quantized import QuantizedArray
from llama_jax.types import Array, Params

# Axes of a layer's matrix that a product sums over, where they are not the first one alone.
_NUM_SUMMED = {'o': 2}


def is_unstacked(params: Params) -> bool:
    """Whether each layer has arrays of its own."""
    return isinstance(params['blocks'], tuple)


def unstack(params: Params, dtype: jax.typing.DTypeLike | None = None, *, delete: bool = False) -> Params:
    """The weights with a tuple of layers for `blocks`; all else is passed on, where `dtype` allows as it is.

    Args:
      params: as a checkpoint has them, in any representation whose arrays have the layers as their first axis; abstract
        ones too. Those of layers apart are given back.
      dtype: of the computation: arrays of matrices in a wider floating-point type are rounded to it once, as they would
        be in each of their products; on one CPU those of the layers become `OutputMajorArray`, by which few rows are
        multiplied faster. None: nothing is changed.
      delete: the given arrays are deleted one after the other, as soon as they are unstacked or rounded, so that one
        weight at a time is in memory twice. Otherwise they stay, beside these.

    Returns:
      Arrays placed as the given ones are.
    """
    if is_unstacked(params):
        return params
    weights, structure = jax.tree_util.tree_flatten_with_path(params['blocks'], is_leaf=_is_representation)
    columns = [_layers(path[-1].key, weight, dtype, delete) for path, weight in weights]
    rest = {name: weight for name, weight in params.items() if name != 'blocks'}
    rest = jax.tree.map(lambda weight: _rounded(weight, dtype, delete), rest, is_leaf=_is_representation)
    return rest | {'blocks': tuple(structure.unflatten(row) for row in zip(*columns, strict=True))}


def layers_of(blocks: Any, num_layers: int) -> tuple[Params, ...]:
    """The layers' weights, of stacked ones slices: for a program that is traced."""
    if isinstance(blocks, tuple):
        return blocks
    return tuple(jax.tree.map(lambda weight: weight[layer], blocks) for layer in range(num_layers))  # noqa: B023


def _is_representation(node: Any) -> bool:
    return isinstance(node, Representation)


def _layers(name: str, weight: Any, dtype: jax.typing.DTypeLike | None, delete: bool) -> tuple[Any, ...]:
    num_summed = 0
    if _is_representation(weight):  # its types are its own
        leaves, structure = jax.tree.flatten(weight)
        is_int8 = isinstance(weight, QuantizedArray) and weight.qvalue.dtype == jnp.int8
        if dtype is not None and is_int8 and _is_on_one_cpu(weight.qvalue):
            num_summed = _NUM_SUMMED.get(name, 1)
        columns = [_split(leaf, leaf.dtype, delete, num_summed) for leaf in leaves]
        layers = tuple(structure.unflatten(row) for row in zip(*columns, strict=True))
    else:
        own_dtype = _narrower(weight, weight.ndim - 1, dtype)
        if dtype is not None and weight.ndim > 2 and _is_on_one_cpu(weight):
            num_summed = _NUM_SUMMED.get(name, 1)
        layers = _split(weight, own_dtype, delete, num_summed)
    return tuple(OutputMajorArray(layer, num_summed) for layer in layers) if num_summed else layers


def _is_on_one_cpu(leaf: Any) -> bool:
    if (sharding := getattr(leaf, 'sharding', None)) is None:
        return jax.default_backend() == 'cpu'
    return [device.platform for device in sharding.device_set] == ['cpu']


def _split(leaf: Any, dtype: Any, delete: bool, num_summed: int = 0) -> tuple[Any, ...]:
    """[L, ...] -> L times [...]; where `num_summed` is given, by outputs."""
    sharding = getattr(leaf, 'sharding', None)
    if isinstance(sharding, NamedSharding):
        spec = PartitionSpec(*sharding.spec[1:])
        sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return (jax.ShapeDtypeStruct(leaf.shape[1:], dtype, sharding=sharding),) * leaf.shape[0]
    layers = _splitting(leaf.shape[0], dtype, sharding, num_summed)(leaf)
    if delete and isinstance(leaf, jax.Array):
        leaf.delete()
    return layers


def _rounded(weight: Any, dtype: jax.typing.DTypeLike | None, delete: bool) -> Any:
    if _is_representation(weight) or (new := _narrower(weight, weight.ndim, dtype)) == weight.dtype:
        return weight
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(weight.shape, new, sharding=weight.sharding)
    rounded = jnp.asarray(weight, new)
    if delete and isinstance(weight, jax.Array):
        weight.delete()
    return rounded


def _narrower(weight: Any, ndim: int, dtype: jax.typing.DTypeLike | None) -> Any:
    """The type of a matrix; norms stay as they are, which are small and are read in fp32 where they are so."""
    if dtype is None or ndim < 2 or not jnp.issubdtype(weight.dtype, jnp.floating):
        return weight.dtype
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize < weight.dtype.itemsize else weight.dtype


@functools.lru_cache(maxsize=64)
def _splitting(num_layers: int, dtype: Any, sharding: Any, num_summed: int) -> Any:
    shardings = None if sharding is None else (sharding,) * num_layers

    def one(leaf: Array) -> Array:
        return by_outputs(leaf, num_summed) if num_summed else leaf

    return jax.jit(
        lambda leaf: tuple(one(leaf[layer].astype(dtype)) for layer in range(num_layers)),
        out_shardings=shardings,
    )
