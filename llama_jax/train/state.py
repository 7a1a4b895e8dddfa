"""What training changes: step, params, optimiser state; born with its shardings."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from llama_jax.models.llama import Transformer, init_params, param_axes
from llama_jax.partitioning import Partitioner
from llama_jax.types import Array, Params, PyTree


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes.

    Attributes:
      step: updates done.
      params: fp32 master weights.
      opt_state: of the optimiser.
    """

    step: Int[Array, '']
    params: Params
    opt_state: PyTree


def init_state(model: Transformer, tx: optax.GradientTransformation, rng: Array) -> TrainState:
    """A fresh state; place it by jitting this with `state_shardings` as its output shardings."""
    params = init_params(model, rng)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def state_from_params(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state at step 0 that continues from given weights with a new optimiser."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(
    model: Transformer, tx: optax.GradientTransformation, partitioner: Partitioner
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without memory: what a checkpoint is restored into.

    An optimiser's moments lie as their weights do; what has another shape (factored moments, counters) is replicated.
    """
    state = jax.eval_shape(lambda: init_state(model, tx, jax.random.key(0)))
    replicated = partitioner.sharding()
    params = jax.tree.map(_placed, state.params, partitioner.tree_shardings(state.params, param_axes(model)))
    by_path = {_dict_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place_moment(path, leaf):
        keys = _dict_path(path)  # an optimiser may keep its states by label, a dict around the params'
        param = next((by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path), None)
        return _placed(
            leaf, param.sharding if param is not None and param.shape == leaf.shape else replicated
        )

    opt_state = jax.tree_util.tree_map_with_path(place_moment, state.opt_state)
    step: Any = _placed(state.step, replicated)
    return TrainState(step, params, opt_state)


def _dict_path(path) -> tuple[str, ...]:
    """The keys of the params dict that a path ends in, whatever optimiser structs stand before them."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _placed(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def shardings_of(abstract: PyTree) -> PyTree:
    """The shardings of an abstract tree, for `jax.jit`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
