"""What training changes: step, params, optimiser state; born with its shardings."""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from llama_jax.partitioning import Partitioner
from llama_jax.table import html_of
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

    def __repr__(self) -> str:
        return f'TrainState({", ".join(f"{name}: {value}" for name, value in self._shown().items())})'

    def _repr_html_(self) -> str:
        return html_of('TrainState', self._shown())

    def _shown(self) -> dict[str, object]:
        def size(tree: PyTree) -> str:
            shapes = [leaf.shape for leaf in jax.tree.leaves(tree) if hasattr(leaf, 'shape')]
            return f'{sum(map(math.prod, shapes)):,} numbers in {len(shapes)} arrays'

        return {'step': self.step, 'params': size(self.params), 'opt_state': size(self.opt_state)}


def new_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state at step 0 that begins with these weights; place it by jitting this with `shardings_of` its target."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(
    params: Params, axes: PyTree, tx: optax.GradientTransformation, partitioner: Partitioner
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without memory: what a checkpoint is restored into.

    An optimiser's moments lie as their weights do; what has another shape (factored moments, counters) is replicated.

    Args:
      params: abstract; a weight is an array, or a representation of one (`ops.linear`) with several leaves.
      axes: a tree like `params` with a tuple of logical axes at each leaf.
      tx: the optimiser.
      partitioner: places them.
    """
    state = jax.eval_shape(functools.partial(new_state, tx=tx), params)
    replicated = partitioner.sharding()
    placed = jax.tree.map(_placed, state.params, partitioner.tree_shardings(state.params, axes))
    by_path = dict(jax.tree_util.tree_leaves_with_path(placed))

    def place_moment(path, leaf):
        # The path of a moment is its weight's, behind that of the optimiser's own structs and labels.
        param = next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), None)
        return _placed(
            leaf, param.sharding if param is not None and param.shape == leaf.shape else replicated
        )

    opt_state = jax.tree_util.tree_map_with_path(place_moment, state.opt_state)
    step: Any = _placed(state.step, replicated)
    return TrainState(step, placed, opt_state)


def _placed(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def shardings_of(abstract: PyTree) -> PyTree:
    """The shardings of an abstract tree, for `jax.jit`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
