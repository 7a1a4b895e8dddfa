"""Params whose weights become integers, or floating point again, on the devices where they are."""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding

from llama_jax.errors import InputError
from llama_jax.ops.nf4 import Nf4Array, quantize_nf4
from llama_jax.ops.output_major import OutputMajorArray
from llama_jax.ops.quantized import QuantizedArray, quantize_array, scale_shape
from llama_jax.quantize.forms import NF4, Form, choose_forms, name_of, num_stacked, represent, summed_axes
from llama_jax.types import Params


def quantize(params: Params, dtype: str, group: int | None = None) -> Params:
    """The params with matrices and tables in integers, each placed as the weight was.

    Args:
      params: floating-point weights, of any mesh, layers stacked or apart.
      dtype: see `choose_forms`.
      group: see `choose_forms`.

    Raises:
      InputError: as `choose_forms`; or a weight is quantised already.
    """

    def is_by_outputs(weight: Any) -> bool:
        return isinstance(weight, OutputMajorArray) and not is_quantized(weight)

    params = jax.tree.map(lambda w: w.materialize() if is_by_outputs(w) else w, params, is_leaf=is_by_outputs)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    named = {name_of(keys): leaf for keys, leaf in leaves}
    if done := [
        f'{path} ({jax.tree.leaves(leaf)[0].dtype})' for path, leaf in named.items() if is_quantized(leaf)
    ]:
        raise InputError(f'the weights are quantised already: {done[0]}; give those in floating point')
    forms, _ = choose_forms({path: leaf.shape for path, leaf in named.items()}, dtype, group)
    return jax.tree.unflatten(
        structure, [_quantized(path, leaf, forms.get(path)) for path, leaf in named.items()]
    )


def dequantize(params: Params) -> Params:
    """The params with all weights in floating point: what the integers stand for, float32."""
    return jax.tree.map(lambda w: w.materialize() if is_quantized(w) else w, params, is_leaf=is_quantized)


def is_quantized(weight: Any) -> bool:
    """Whether it is integers with scales; where trees of weights are walked, such a one is a leaf."""
    values = weight.values if isinstance(weight, OutputMajorArray) else weight
    return isinstance(values, QuantizedArray | Nf4Array)


def _quantized(path: str, weight: jax.Array, form: Form | None) -> Any:
    if form is None:
        return weight
    placed = None
    if isinstance(weight.sharding, NamedSharding):
        target = represent(
            path, jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=weight.sharding), form
        )
        placed = jax.tree.map(lambda leaf: leaf.sharding, target)
    return _compiled(path, form, placed)(weight)


@functools.lru_cache(maxsize=64)
def _compiled(path: str, form: Form, placed: QuantizedArray | Nf4Array | None) -> Any:
    def run(weight):
        summed = summed_axes(path, weight.ndim)
        if form.dtype != NF4:
            return quantize_array(weight, form.dtype, summed, form.group)
        counts = scale_shape(weight.shape, summed, form.group)
        assert counts is not None, path
        return quantize_nf4(weight, counts, num_stacked=num_stacked(path, weight.ndim))

    return jax.jit(run, out_shardings=placed)
