"""One update, the same for every objective: what differs is the loss function and what is frozen."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.train.state import TrainState, shardings_of
from llama_jax.types import Array, LossFn, Metrics, Params, PyTree


def train_step(
    state: TrainState,
    frozen: PyTree,
    batch: PyTree,
    rng: Array,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    num_microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """Gradients of the weighted mean loss over the whole batch, and one optimiser update.

    Args:
      state: donated by `compile_train_step`.
      frozen: what the loss reads and nothing changes (a reference model, a LoRA's base); {} for none.
      batch: a struct of arrays [B, ...].
      rng: the run's key; each step folds its number in.
      loss_fn: sums, see `types.LossFn`.
      tx: the optimiser.
      num_microbatches: parts of the batch taken one after the other. Losses, weights and gradients are summed and
        divided once, so the result is that of the whole batch however unevenly the tokens fall.

    Returns:
      The next state, and the means `loss` and any of the loss function's own, with `weight` and `grad_norm`.
    """
    rng = jax.random.fold_in(rng, state.step)

    def loss_and_aux(params: Params, microbatch: PyTree, key: Array):
        loss, weight, sums = loss_fn(params, frozen, microbatch, key)
        return loss, (weight, sums)

    gradient_fn = jax.value_and_grad(loss_and_aux, has_aux=True)

    if num_microbatches == 1:
        (loss, (weight, sums)), gradients = gradient_fn(state.params, batch, rng)
    else:
        # One loop over all of them, so that the gradient program is traced and compiled once. Sums of gradients begin
        # with zeros, to which the first are added exactly; those of the others are small and follow the loop.
        def add(total: PyTree, item: tuple[PyTree, Array]) -> tuple[PyTree, PyTree]:
            sums, gradients = gradient_fn(state.params, *item)
            return jax.tree.map(jnp.add, total, gradients), sums

        items = _split(batch, num_microbatches), jax.random.split(rng, num_microbatches)
        gradients, parts = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.params), items)
        loss, (weight, sums) = jax.tree.map(_sum_in_order, parts)

    scale = 1.0 / jnp.maximum(weight, 1.0)
    gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {name: value * scale for name, value in {'loss': loss, **sums}.items()}
    metrics |= {'weight': weight, 'grad_norm': optax.tree_utils.tree_norm(gradients)}
    return TrainState(state.step + 1, params, opt_state), metrics


def _split(batch: PyTree, num_microbatches: int) -> PyTree:
    """The microbatches, stacked. Row r goes to microbatch r % n: every device keeps its rows."""

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def _sum_in_order(parts: Array) -> Array:
    """Over the first axis, one after the other: rounded as it was when the loop carried the sum."""
    return functools.reduce(jnp.add, parts)


def compile_train_step(
    abstract_state: TrainState,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    num_microbatches: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
    donate: bool = True,
) -> Callable[[TrainState, PyTree, PyTree, Array], tuple[TrainState, Metrics]]:
    """`train_step` as one jitted function: the state keeps its shardings and gives its buffers to the next."""
    step = functools.partial(train_step, loss_fn=loss_fn, tx=tx, num_microbatches=num_microbatches)
    return jax.jit(
        step,
        out_shardings=(shardings_of(abstract_state), None),
        donate_argnums=0 if donate else (),
        compiler_options=dict(compiler_options or {}) or None,
    )
