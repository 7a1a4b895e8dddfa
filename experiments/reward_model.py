"""Trains a reward model on pairs of answers.

    python -m experiments.reward_model --config=configs/reward_model.py:llama2_7b --workdir=DIR --checkpoint=CKPT

CKPT is a language model, whose head a score replaces, or a reward model. Running the same command again resumes. At the
end report.json holds how held-out pairs are ordered, beside rules that know nothing, and model.json the mean and the
spread of held-out scores.
"""

import dataclasses
import functools
from typing import Any

from experiments import launch, training
from experiments.run import preferences
from experiments.run.objective import objective_of, reading_model, scored
from llama_jax import runtime
from llama_jax.checkpoint.model_file import add_to_config
from llama_jax.data.loader import batches
from llama_jax.data.preference_dataset import PreferenceData
from llama_jax.data.preferences import collate_preferences
from llama_jax.data.records import check_records
from llama_jax.errors import InputError
from llama_jax.losses.reward import margin_scale, pair_scores
from llama_jax.train.loop import Trained

_CONFIG = launch.define_config()
_RUN = launch.define_run()


def main() -> None:
    """One run from start to report."""
    config, flags = _CONFIG.value, _RUN.value
    with runtime.refused_by_all(), launch.flags_named('--config.reward.margin'):
        margin_scale(config.reward.margin)
    plan = training.plan(config, **flags, check_data=check_records, from_scores=True)
    with runtime.refused_by_all():
        data = preferences.read_data(plan)
        if config.reward.safety and not data.says_what_is_safe:
            raise InputError(
                f'--config.reward.safety={config.reward.safety}, and no answer of --config.data.train says whether it '
                'is safe: give chosen_safe and rejected_safe, or set it to 0'
            )
    plan = training.in_epochs(plan, data.num_rows)
    objective = objective_of(config, plan.model, plan.partitioner, plan.base, num_pairs=data.num_pairs)
    model: Any = scored(plan.model)
    plan = dataclasses.replace(plan, model=model)
    run = training.begin(plan, objective, data.fingerprint)
    rows = batches(data.train, objective.batch, collate=collate_preferences, rows_consumed=run.rows_before)
    measurements = []
    if data.validation:
        figures = ('accuracy', 'margin')
        measurements = [preferences.validation(plan, objective, data.validation, figures)]
    trained = training.fit(run, lambda state, step: next(rows), measurements)
    if not trained.stopped:
        report(run, data, trained)


def report(run: training.Run, data: PreferenceData, trained: Trained) -> None:
    """report.json and its plots; mean and spread of held-out scores in model.json; what is said of them."""
    plan, found = run.plan, {'step': trained.step}
    if data.validation:
        read = reading_model(plan.config, plan.model)
        step, weights = functools.partial(pair_scores, read), (run.objective.weights(trained.state),)
        scores = preferences.figures_of(plan, run.objective, step, weights, data.validation)
        found |= preferences.judged(data, scores)
    if not runtime.is_main_process():
        return
    if data.validation:
        spread = {'mean': found['mean'], 'std': found['std']}
        add_to_config(plan.workdir, scores=spread)
        preferences.plot(plan.workdir, data, scores)
    training.write_report(run, found, {}, 'loss per pair')
    print(preferences.describe(found, plan.workdir))


if __name__ == '__main__':
    launch.run(main, resumable=True)
