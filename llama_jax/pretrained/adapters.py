"""Adapters on disk: the model that they and their base are together, and whether it is the base that they are of."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from llama_jax.checkpoint.model_file import CHECKPOINTS
from llama_jax.checkpoint.weights import latest_step, open_params
from llama_jax.convert import bitsandbytes
from llama_jax.convert.mapping import Leaf, Source, leaf_shape, weights_of
from llama_jax.errors import InputError
from llama_jax.lora import merged_leaves
from llama_jax.models.config import LlamaConfig
from llama_jax.placement import BlockArray, GrownTable, place_all
from llama_jax.quantize.base import kept_leaves
from llama_jax.types import Params

_TABLES = ('embed', 'head')  # a row for every id of the vocabulary


def whole_leaves(
    config: LlamaConfig, base: Source, trained: Mapping[str, BlockArray], adapters: Mapping[str, Any]
) -> dict[str, BlockArray]:
    """By path of the params: the base as it was kept, with what was trained added in float32.

    Args:
      config: of the whole model, whose vocabulary may have grown.
      base: the weights that the adapters are of.
      trained: the leaves that a checkpoint of adapters holds.
      adapters: what model.json says of them.

    Raises:
      InputError: a leaf is of no weight of the model, or of another shape.
    """
    shapes = {weight.path: leaf_shape(weight, config) for weight in weights_of(config)}
    leaves: dict[str, BlockArray] = {}
    for weight in weights_of(base.config):
        leaf = Leaf(base, weight)
        wanted = shapes.get(weight.path, leaf.shape)
        is_grown = weight.path in _TABLES and leaf.shape[0] < wanted[0]
        leaves[weight.path] = GrownTable(leaf, wanted[0]) if is_grown else leaf
    kept = kept_leaves(leaves, adapters['weights'], bitsandbytes.stored_codes(base))
    return merged_leaves(kept, trained, shapes, adapters['scale'])


def fingerprint_of(source: Source) -> str:
    """SHA-256 of the shape and first row of each weight, in four of the layers: in any format the same."""
    digest = hashlib.sha256()
    for weight in weights_of(source.config):
        tensors = source.tensors[weight.path]
        for layer in sorted({round(i * (len(tensors) - 1) / 3) for i in range(4)}):
            row = tensors[layer].read(slice(0, 1))
            digest.update(f'{weight.path} {layer} {tuple(tensors[layer].shape)} '.encode())
            digest.update(np.ascontiguousarray(row, np.float32).tobytes())
    return digest.hexdigest()


def check_fingerprint(found: str, base: object, fingerprint: str, origin: object) -> None:
    """Raises InputError where a base is not the one that adapters were trained beside."""
    if found != fingerprint:
        raise InputError(
            f'{origin} holds adapters of another model than is now in {base}: its fingerprint is {found[:12]}, that of '
            f'their base was {fingerprint[:12]}; restore what was there'
        )


def trained_params(workdir: epath.Path, target: Params, step: epath.Path | None = None) -> Params:
    """What was trained beside a base, placed as `target` says: a step of a workdir, its newest where none is named.

    Raises:
      InputError: what is there is of other weights, or another rank.
    """
    stored = open_params(step or latest_step(workdir / CHECKPOINTS))
    wanted, structure = jax.tree_util.tree_flatten_with_path(target)
    found = []
    for keys, leaf in wanted:
        name = '/'.join(str(key.key) for key in keys)
        array = stored.get(name)
        if array is None or tuple(array.shape) != tuple(leaf.shape):
            has = 'no' if array is None else f'{tuple(array.shape)} as'
            raise InputError(
                f'{workdir} has {has} trained {name}, and {tuple(leaf.shape)} is wanted: its adapters must be of the '
                'same weights and rank'
            )
        found.append((name, array, leaf))
    return jax.tree.unflatten(structure, place_all(found))
