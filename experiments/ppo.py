"""Trains a policy on its own answers: PPO, GRPO and kin.

    python -m experiments.ppo --config=configs/ppo.py:llama2_7b --workdir=DIR --checkpoint=CKPT

Prompts are `config.data.train`, what answers are worth `config.algorithm.rewards`. CKPT is the policy that training
starts from, and its reference. The algorithm is `config.algorithm.name`; recipes of GRPO and kin are in
configs/grpo.py. Running the same command again resumes, within an iteration too. At the end report.json holds the
reward at the beginning and the end, and reward_over_kl.png how it rose.
"""

from typing import Any

from experiments import launch, training
from experiments.adapters import SharedBase
from experiments.iterations import HELD_OUT, Iterations
from experiments.objective import objective_of, scored
from experiments.policy import check_policy, sampler_partitioner
from experiments.policy_memory import available_memory, check_memory, held
from experiments.prompts import read_prompts
from experiments.reference import frozen_reference
from experiments.rewards import check_rewards, open_rewards, parse_rewards
from llama_jax import runtime
from llama_jax.data.records import check_records
from llama_jax.rl.frontier import plot_frontier
from llama_jax.train.metrics import read_metrics
from llama_jax.train.state import abstract_state
from llama_jax.types import InputError

_CONFIG = launch.define_config()
_RUN = launch.define_run()


def main() -> None:
    """One run from start to report."""
    config, flags = _CONFIG.value, _RUN.value
    with runtime.refused_by_all():
        recipe = check_policy(config)
        with launch.flags_named('--config.algorithm.rewards'):
            terms = parse_rewards(config.algorithm.rewards)
            check_rewards(terms, allow_code=False)
        if not flags['checkpoint']:
            raise InputError('a policy starts from a model: give it by --checkpoint')
    plan = training.plan(config, **flags, check_data=check_records)
    with runtime.refused_by_all():
        sampler = plan.model.clone(remat='none', partitioner=sampler_partitioner(config, plan.partitioner))
        prompts = read_prompts(plan)
    whole = not config.lora.rank
    objective = objective_of(
        config, plan.model, plan.partitioner, plan.base,
        reference=frozen_reference(plan) if whole and recipe.algorithm.has_reference else {},
    )  # fmt: skip
    with launch.flags_named('--config.algorithm.rewards'):
        judges = open_rewards(
            terms, tokenizer=plan.tokenizer, max_new_tokens=config.rollout.max_new_tokens,
            partitioner=plan.partitioner, dtype=plan.model.dtype,
            shared=None if whole else SharedBase(objective.provenance['adapters'], objective.frozen),
        )  # fmt: skip
    target = abstract_state(objective.params, objective.axes, plan.tx, plan.partitioner)
    longest = max(map(len, prompts.ids))
    with runtime.refused_by_all():
        check_memory(
            held(config, objective, target, sampler, judges=judges.weights, longest=longest),
            available_memory(),
        )
    run = training.begin(plan, objective, prompts.fingerprint)
    iterations = Iterations(run, scored(plan.model), sampler, prompts, judges.rewards)
    trained = training.fit(run, iterations.next_batch, iterations.measurements())
    if trained.stopped or not runtime.is_main_process():
        return
    lines = read_metrics(plan.workdir / training.METRICS_FILE)
    report = report_of(lines) | {'step': trained.step}
    training.write_report(run, report, {})
    plot_frontier(plan.workdir / 'reward_over_kl.png', lines)
    print(describe(report, plan.workdir))


def report_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What an iteration had at first and at last, by figure."""
    found = {}
    for name in ('reward', HELD_OUT, 'kl', 'answer_length', 'stopped', 'sampler_gap', 'explained_variance'):
        values = [line[name] for line in lines if name in line]
        if values:
            found[name] = {'first': values[0], 'last': values[-1]}
    return found


def describe(report: dict[str, Any], workdir: Any) -> str:
    """The report as people read it."""
    lines = [f'\ntrained {report["step"]} steps', f'{"":20} {"first":>10} {"last":>10}']
    for name, ends in report.items():
        if isinstance(ends, dict):
            lines.append(f'{name:20} {ends["first"]:10.4f} {ends["last"]:10.4f}')
    return '\n'.join([*lines, '', f'reward over KL: {workdir / "reward_over_kl.png"}'])


if __name__ == '__main__':
    launch.run(main, resumable=True)
