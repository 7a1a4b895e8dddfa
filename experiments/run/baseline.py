"""What answers that were judged alone are compared with: how much likelier answers to other prompts became.

The mean over a batch of such answers, by the weights before an update, stands in the batch of that update: the same
whatever its microbatches and its mesh. KTO's z (`losses.dpo`).
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax

from experiments.run.objective import Objective, baseline_sums
from experiments.run.preferences import pairs_target
from experiments.training import Plan
from llama_jax.data.loader import PaddedRows, batches
from llama_jax.data.preference_dataset import PreferenceData
from llama_jax.data.preferences import collate_preferences
from llama_jax.train.state import TrainState
from llama_jax.types import PreferenceBatch

NextBatch = Callable[[TrainState, int], PreferenceBatch]


def with_baseline(
    objective: Objective,
    others: PreferenceData,
    rows: Iterator[PreferenceBatch],
    rows_before: int,
) -> NextBatch:
    """The batches of `rows`, each with its baseline by the state that is about to be updated.

    Args:
      objective: what is trained.
      others: the prompts with answers to others.
      rows: of the answers that were judged.
      rows_before: rows consumed; of both as many.
    """
    assert objective.before is not None
    measure = jax.jit(objective.before, out_shardings=objective.batch.baseline.sharding)
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
    sums = jax.jit(baseline_sums(plan.config, plan.model))
    target = pairs_target(plan, objective, rows)

    def measure(state: TrainState) -> float:
        padded = PaddedRows(rows, target.tokens.shape[0])
        found = [
            sums(objective.weights(state), objective.frozen, batch)
            for batch in batches(padded, target, collate=collate_preferences)
        ]
        total, number = (sum(map(float, column)) for column in zip(*found, strict=True))
        return max(0.0, total / max(1.0, number))

    return measure
