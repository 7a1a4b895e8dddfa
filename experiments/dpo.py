"""Trains a policy on pairs of answers, or on answers judged alone, without a reward model: DPO and its kin.

    python -m experiments.dpo --config=configs/dpo.py:llama3_8b --workdir=DIR --checkpoint=CKPT

CKPT is the policy that training starts from, and its reference. Running the same command again resumes. At the end
report.json holds how held-out pairs are ordered by the rewards that the policy stands for, beside rules that know
nothing.
"""

from experiments import launch, training
from experiments.policy.reference import frozen_reference, keep_reference
from experiments.run import preferences
from experiments.run.baseline import held_out_baseline, with_baseline
from experiments.run.objective import loss_of, objective_of, reading_model
from llama_jax import runtime
from llama_jax.data.loader import batches
from llama_jax.data.preferences import collate_preferences
from llama_jax.data.records import check_records
from llama_jax.errors import InputError
from llama_jax.losses.dpo import answer_rewards

_CONFIG = launch.define_config()
_RUN = launch.define_run()


def main() -> None:
    """One run from start to report."""
    config, flags = _CONFIG.value, _RUN.value
    with runtime.refused_by_all():
        loss = loss_of(config)
        if loss.has_reference and not flags['checkpoint']:
            raise InputError(
                f'--config.loss.kind={loss.kind} has a reference: the policy of --checkpoint; give it'
            )
    plan = training.plan(config, **flags, check_data=check_records)
    with runtime.refused_by_all():
        data = preferences.read_data(plan, judged=not loss.has_pairs)
    plan = training.in_epochs(plan, data.num_rows)
    live = loss.has_reference and config.loss.reference == 'live'
    objective = objective_of(
        config, plan.model, plan.partitioner, plan.base, num_pairs=data.num_pairs,
        reference=frozen_reference(plan) if live and not config.lora.rank else {},
    )  # fmt: skip
    run = training.begin(plan, objective, data.fingerprint)
    if loss.has_reference and not live:
        keep_reference(run, data)
        if data.others:
            keep_reference(run, data.others, 'reference_others.npz')
    rows = batches(data.train, objective.batch, collate=collate_preferences, rows_consumed=run.rows_before)
    next_batch, baseline = lambda state, step: next(rows), lambda state: 0.0
    if data.others:
        next_batch = with_baseline(objective, data.others, rows, run.rows_before)
        if data.validation:
            baseline = held_out_baseline(plan, objective, data.others)
    measurements = []
    if data.validation:
        figures = ('accuracy', 'reward_margin' if loss.has_pairs else 'reward')
        measurements = [preferences.validation(plan, objective, data.validation, figures, baseline)]
    trained = training.fit(run, next_batch, measurements)
    if trained.stopped:
        return
    report = {'step': trained.step}
    if data.validation:
        read, kept = reading_model(config, plan.model), loss.has_reference and not live
        step = answer_rewards(read, loss, kept=kept, num_chunks=config.train.loss_chunks)
        weights = objective.weights(trained.state), objective.frozen
        rewards = preferences.figures_of(plan, objective, step, weights, data.validation)
        report |= preferences.judged(data, rewards)
        if runtime.is_main_process():
            preferences.plot(plan.workdir, data, rewards, 'reward')
    if runtime.is_main_process():
        training.write_report(run, report, {}, 'loss per pair, or answer judged alone')
        print(preferences.describe(report, plan.workdir))


if __name__ == '__main__':
    launch.run(main, resumable=True)
