"""What answers that were judged alone are compared with: how much likelier answers to other prompts became.

The mean over a batch of such answers, by the weights before an update, stands in the batch of that update: the same
whatever its microbatches and its mesh. KTO's z (`losses.dpo`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.objective import Objective, loss_of, reading_model
from experiments.preferences import pairs_target
from experiments.training import Plan
from llama_jax.data.loader import PaddedRows, batches
from llama_jax.data.preference_dataset import PreferenceData
from llama_jax.data.preferences import collate_preferences
from llama_jax.losses.dpo import ratio_sums
from llama_jax.train.state import TrainState
from llama_jax.types import PreferenceBatch

NextBatch = Callable[[TrainState, int], PreferenceBatch]
_Sums = Callable[[Any, Any, PreferenceBatch], tuple[jax.Array, jax.Array]]


def with_baseline(
    plan: Plan,
    objective: Objective,
    others: PreferenceData,
    rows: Iterator[PreferenceBatch],
    rows_before: int,
) -> NextBatch:
    """The batches of `rows`, each with its baseline by the state that is about to be updated.

    Args:
      plan: of the run.
      objective: what is trained.
      others: the prompts with answers to others.
      rows: of the answers that were judged.
      rows_before: rows consumed; of both as many.
    """
    sums = _sums(plan)

    def measured(weights: Any, frozen: Any, batch: PreferenceBatch) -> jax.Array:
        total, number = sums(weights, frozen, batch)
        return jnp.full_like(batch.baseline, jnp.maximum(total / jnp.maximum(number, 1.0), 0.0))

    measure = jax.jit(measured, out_shardings=objective.batch.baseline.sharding)
    other_rows = batches(
        others.train, objective.batch, collate=collate_preferences, rows_consumed=rows_before
    )

    def next_batch(state: TrainState, step: int) -> PreferenceBatch:
        del step
        baseline = measure(objective.weights(state), objective.frozen, next(other_rows))
        return dataclasses.replace(next(rows), baseline=baseline)

    return next_batch


def held_out_baseline(
    plan: Plan, objective: Objective, others: PreferenceData
) -> Callable[[TrainState], float]:
    """The baseline of held-out answers, by a state: over all held-out prompts."""
    rows = others.validation
    assert rows is not None
    target, sums = pairs_target(plan, objective, rows), jax.jit(_sums(plan))

    def measure(state: TrainState) -> float:
        padded = PaddedRows(rows, target.tokens.shape[0])
        found = [
            sums(objective.weights(state), objective.frozen, batch)
            for batch in batches(padded, target, collate=collate_preferences)
        ]
        total, number = (sum(map(float, column)) for column in zip(*found, strict=True))
        return max(0.0, total / max(1.0, number))

    return measure


def _sums(plan: Plan) -> _Sums:
    config = plan.config
    read = reading_model(config, plan.model).clone(remat='none')
    kept = config.loss.reference == 'kept'
    return ratio_sums(read, loss_of(config), kept=kept, num_chunks=config.train.loss_chunks)
