"""What the weights of a model are, as a table."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding

from llama_jax.errors import InputError
from llama_jax.ops.linear import Representation
from llama_jax.table import Table
from llama_jax.types import Params


def describe(params: Params) -> Table:
    """A row for each weight: path, shape, dtype, parameters, bytes, and how it lies on the devices; then the totals.

        llama_jax.describe(params)

    Args:
      params: a tree of weights in any representation, abstract ones too.

    Raises:
      InputError: a leaf has no shape, as it is no weight.
    """
    rows, parameters, total = [], 0, 0
    for keys, weight in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_representation):
        path, leaves = jax.tree_util.keystr(keys, simple=True, separator='/'), jax.tree.leaves(weight)
        if wrong := [leaf for leaf in leaves if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype')]:
            raise InputError(f'{path} is a {type(wrong[0]).__name__}; the leaves of params are arrays')
        count, size = math.prod(leaves[0].shape), sum(map(_num_bytes, leaves))
        kinds = ' + '.join(str(leaf.dtype) for leaf in leaves)
        rows.append((path, str(tuple(leaves[0].shape)), kinds, f'{count:,}', f'{size:,}', _placed(leaves[0])))
        parameters, total = parameters + count, total + size
    header = 'weight', 'shape', 'dtype', 'parameters', 'bytes', 'placed'
    return Table('', header, tuple(rows), ('total', '', '', f'{parameters:,}', f'{total:,}', ''))


def _is_representation(node: Any) -> bool:
    return isinstance(node, Representation)


def _num_bytes(leaf: Any) -> int:
    is_integer = jnp.issubdtype(leaf.dtype, jnp.integer)
    bits = jnp.iinfo(leaf.dtype).bits if is_integer else 8 * leaf.dtype.itemsize
    return math.prod(leaf.shape) * bits // 8


def _placed(leaf: Any) -> str:
    sharding = getattr(leaf, 'sharding', None)
    if isinstance(sharding, SingleDeviceSharding) or (sharding is not None and len(sharding.device_set) == 1):
        return str(next(iter(sharding.device_set)))
    if isinstance(sharding, NamedSharding):
        return f'{len(sharding.device_set)} devices, {sharding.spec}'.replace('PartitionSpec', 'P')
    return 'host' if sharding is None and not isinstance(leaf, jax.ShapeDtypeStruct) else ''
