"""Training in a cell: a state and a step out of a model, its weights and an optimiser."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from llama_jax.errors import InputError, checked_names
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import LlamaForCausalLM, abstract_params, param_axes
from llama_jax.models.model_check import check_kinds
from llama_jax.partitioning import Partitioner, as_mesh
from llama_jax.train.state import TrainState, abstract_state, new_state, shardings_of
from llama_jax.train.step import compile_train_step
from llama_jax.types import LossFn, Metrics, Params, PyTree

Step = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


@checked_names()
def trainer(
    model: LlamaForCausalLM,
    params: Params,
    tx: optax.GradientTransformation,
    loss: LossFn | None = None,
    *,
    num_microbatches: int = 1,
    seed: int = 0,
    donate: bool = False,
) -> tuple[TrainState, Step]:
    """What a loop of one's own needs: the first state, and the jitted step of `train.step` that updates it.

        state, step = llama_jax.trainer(model, params, optax.adamw(1e-4))
        for batch, _ in zip(data.batches(8), range(3)):
            state, metrics = step(state, batch)

    Args:
      model: its partitioner, where it has one, places everything; else it is placed as `params` are.
      params: the weights to start with.
      tx: any optimiser of optax.
      loss: see `types.LossFn`: (params, frozen, batch, rng) -> (sum of losses, their number, further sums); None: of
        the next token, for batches of `PretrainData.batches`.
      num_microbatches: parts of the batch taken one after the other.
      seed: of what a loss draws.
      donate: the weights and every state that a step is given are deleted, which halves the memory. Otherwise they
        stay: they are copied.

    Raises:
      InputError: the params are not the model's; the weight is named.
    """
    check_kinds(model, params)
    _check_params(model, params)
    if not isinstance(tx, optax.GradientTransformation):
        raise InputError(f'tx is {repr(tx)[:60]}; give an optimiser of optax, as optax.adamw(1e-4)')
    partitioner = model.partitioner or _partitioner_of(params)
    if loss is None:
        spread = partitioner if partitioner.mesh.size > 1 else model.partitioner
        loss = language_model_loss(model.clone(partitioner=spread))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    target = abstract_state(shapes, param_axes(model), tx, partitioner)
    taken = 0 if donate else ()
    begin = jax.jit(
        functools.partial(new_state, tx=tx), out_shardings=shardings_of(target), donate_argnums=taken
    )
    with warnings.catch_warnings():  # of weights that lie elsewhere, which are copied whatever is said
        warnings.filterwarnings('ignore', message='Some donated buffers were not usable')
        state = begin(params)
    for leaf in jax.tree.leaves(params) if donate else ():
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
    update = compile_train_step(target, loss_fn=loss, tx=tx, num_microbatches=num_microbatches, donate=donate)
    rng = jax.random.key(seed + 1)  # as the commands have it

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        """One update."""
        with jax.set_mesh(partitioner.mesh):
            return update(state, {}, jax.tree.map(functools.partial(_placed, partitioner), batch), rng)

    return state, step


def _placed(partitioner: Partitioner, values: Any) -> jax.Array:
    """Rows over the devices; what is no array of rows, on all of them."""
    shape = np.shape(values)
    if len(shape) == 2:
        return jax.device_put(values, partitioner.batch_sharding(*shape))
    axes = ('batch', *[None] * (len(shape) - 1)) if shape else ()
    return jax.device_put(values, partitioner.sharding(axes, shape, 'batch'))


def _partitioner_of(params: Params) -> Partitioner:
    """That of the mesh that the weights are spread over."""
    meshes = [
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(params)
        if isinstance(getattr(leaf, 'sharding', None), NamedSharding)
    ]
    return Partitioner(meshes[0] if meshes else as_mesh(None))


def _check_params(model: LlamaForCausalLM, params: Params) -> None:
    def by_path(tree: PyTree) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(keys, simple=True, separator='/'): leaf for keys, leaf in leaves}

    wanted, given = by_path(abstract_params(model)), by_path(params)
    for path in [*wanted, *given]:
        shapes = [tuple(np.shape(tree[path])) if path in tree else None for tree in (given, wanted)]
        if shapes[0] != shapes[1]:
            raise InputError(f'params: weight {path} has shape {shapes[0]}, the model {shapes[1]}')
        leaf = given[path]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f'params: weight {path} holds {leaf.dtype}, which is not trained; load floating-point ones'
            )
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise InputError(
                f'params: weight {path} was deleted: a step that donates took it; load the weights anew'
            )
