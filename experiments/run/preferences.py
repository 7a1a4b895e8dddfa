"""What trainings on pairs of answers share: how they are read, and what is measured of those held out."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.launch import flags_named
from experiments.run.config_file import split_list
from experiments.run.data_schedule import constant_weights
from experiments.run.objective import Objective, pair_loss
from experiments.training import Plan
from llama_jax.data.loader import PaddedRows, batches
from llama_jax.data.preference_dataset import PreferenceData, Reading, preference_dataset
from llama_jax.data.preferences import PreferenceRows, collate_preferences
from llama_jax.data.records import parse_key_map
from llama_jax.eval.preferences import answer_figures, judge, judged_report, preference_report
from llama_jax.eval.preferences_shown import describe_judged, describe_preferences, plot_preferences
from llama_jax.tokenizer.chat_format import chat_format_for
from llama_jax.train.loop import Measurement
from llama_jax.train.state import TrainState
from llama_jax.types import PreferenceBatch

logger = logging.getLogger('llama_jax.preferences')


def read_data(plan: Plan, judged: bool = False) -> PreferenceData:
    """Reads, encodes, packs and mixes the sources: pairs, or answers that were judged alone."""
    config = plan.config
    with flags_named('--config.data.format'):
        chat_format = chat_format_for(plan.tokenizer, config.data.format)
    with flags_named('--config.data.key_map'):
        key_map = parse_key_map(config.data.key_map)
    reading = Reading(
        plan.tokenizer, chat_format, config.data.seq_len, key_map, config.data.on_error, config.data.too_long,
        config.data.share_prompt, judged,
    )  # fmt: skip
    with flags_named('--config.data.train', '--config.data.seq_len', '--config.data.on_error'):
        data = preference_dataset(
            reading, split_list(config.data.train), weights=constant_weights(config),
            validation=split_list(config.data.validation), validation_fraction=config.data.validation_fraction,
            seed=config.seed,
        )  # fmt: skip
    pairs, rows = sum(rows.num_documents for rows in data.train_rows), data.num_rows
    logger.info(
        'training data: %s %s in %s rows of %d; held out: %s', f'{pairs:,}', 'answers' if judged else 'pairs',
        f'{rows:,}', config.data.seq_len,
        f'{data.validation.num_documents:,}' if data.validation else 'none',
    )  # fmt: skip
    if 'reward' in config and config.reward.margin != 'none' and not data.says_by_how_much:
        logger.warning(
            '--config.reward.margin=%s changes nothing: no pair of --config.data.train has a margin above 0',
            config.reward.margin,
        )
    return data


def validation(
    plan: Plan,
    objective: Objective,
    rows: PreferenceRows,
    figures: tuple[str, ...],
    baseline: Callable[[TrainState], float] = lambda state: 0.0,
) -> Measurement:
    """The mean of the loss and of its figures over held-out pairs, as the loop makes it.

    Args:
      plan: of the run.
      objective: what is trained.
      rows: held out.
      figures: names of the loss's, to be logged with `validation_` in front.
      baseline: of a state, what answers that were judged alone are compared with.
    """
    target, loss_fn = pairs_target(plan, objective, rows), pair_loss(plan.config, plan.model)

    @jax.jit
    def sums(weights: Any, frozen: Any, batch: PreferenceBatch, compared_with: float) -> Any:
        batch = dataclasses.replace(batch, baseline=jnp.full_like(batch.baseline, compared_with))
        return loss_fn(weights, frozen, batch, jax.random.key(0))

    def measure(state: TrainState, step: int, pause: Callable[[], None]) -> dict[str, float]:
        totals = dict.fromkeys(('loss', *figures), 0.0)
        weight, compared_with = 0.0, baseline(state)
        padded = PaddedRows(rows, target.tokens.shape[0])
        for batch in batches(padded, target, collate=collate_preferences):
            loss, counted, found = sums(objective.weights(state), objective.frozen, batch, compared_with)
            weight += float(counted)
            for name, value in {'loss': loss, **found}.items():
                if name in totals:
                    totals[name] += float(value)
            pause()
        means = {f'validation_{name}': total / weight for name, total in totals.items()}
        logger.info('step %d: %s', step, ', '.join(f'{name} {value:.4f}' for name, value in means.items()))
        return means

    return Measurement(plan.config.eval.every, measure, tuple(f'validation_{n}' for n in ('loss', *figures)))


def pairs_target(plan: Plan, objective: Objective, rows: PreferenceRows) -> PreferenceBatch:
    """The abstract batch of some rows, which hold another number of pairs than those of training."""
    batch = objective.batch
    shape = plan.config.train.batch_size, plan.config.data.seq_len
    return PreferenceBatch.abstract(*shape, rows.num_pairs, batch.tokens.sharding, batch.weights.sharding)


def figures_of(
    plan: Plan,
    objective: Objective,
    step: Callable[..., Any],
    weights: tuple[Any, ...],
    rows: PreferenceRows,
) -> np.ndarray:
    """A figure of each answer of some rows, [pairs, 2]: `step(*weights, batch)` gives those of a batch."""
    compiled = jax.jit(step, out_shardings=plan.partitioner.sharding())
    return answer_figures(functools.partial(compiled, *weights), rows, pairs_target(plan, objective, rows))


def judged(data: PreferenceData, figures: np.ndarray) -> dict[str, Any]:
    """How held-out pairs are ordered by the figures of their answers, beside rules that know nothing."""
    assert data.validation is not None
    if data.others:
        return judged_report(data.validation.pairs, figures)
    found = judge(data.validation.pairs, figures)
    train = [pair for rows in data.train_rows for pair in rows.pairs]
    return preference_report(found, train, data.validation.pairs)


def plot(folder: epath.Path, data: PreferenceData, figures: np.ndarray, name: str = 'score') -> None:
    """preferences.png: histograms of both answers' figures, and how often the better one is by their difference."""
    assert data.validation is not None
    if data.others:
        return  # no two answers are compared
    plot_preferences(folder / 'preferences.png', judge(data.validation.pairs, figures), name)


def describe(report: dict[str, Any], workdir: epath.Path) -> str:
    """The report as people read it."""
    lines = [f'\ntrained {report["step"]} steps']
    if 'accuracy' in report:
        lines += describe_preferences(report)
    if 'above' in report:
        lines += describe_judged(report)
    return '\n'.join([*lines, '', f'loss curve: {workdir / "loss.png"}'])
