"""Trains a policy on its own answers: PPO, GRPO and kin.

    python -m experiments.ppo --config=configs/ppo.py:llama2_7b --workdir=DIR --checkpoint=CKPT

Prompts are `config.data.train`, what answers are worth `config.algorithm.rewards`. CKPT is the policy that training
starts from, and its reference. The algorithm is `config.algorithm.name`; recipes of GRPO and kin are in
configs/grpo.py. Running the same command again resumes, within an iteration too. At the end report.json holds the
reward at the beginning and the end, and reward_over_kl.png how it rose.
"""

from typing import Any

from absl import flags

from experiments import launch, training
from experiments.policy.beginning import begin_policy
from experiments.policy.iterations import HELD_OUT
from llama_jax import runtime
from llama_jax.rl.frontier import plot_frontier
from llama_jax.train.metrics import read_metrics

_CONFIG = launch.define_config()
_RUN = launch.define_run()
_ALLOW_CODE = flags.DEFINE_boolean(
    'allow_code_execution', False, 'a reward task: may run generated programs, in a sandbox'
)


def main() -> None:
    """One run from start to report."""
    run, iterations = begin_policy(_CONFIG.value, allow_code=_ALLOW_CODE.value, **_RUN.value)
    trained = training.fit(run, iterations.next_batch, iterations.measurements(), prepare=iterations.prepare)
    if trained.stopped or not runtime.is_main_process():
        return
    workdir = run.plan.workdir
    lines = read_metrics(workdir / training.METRICS_FILE)
    report = report_of(lines) | {'step': trained.step}
    training.write_report(run, report, {}, 'loss of a minibatch')
    plot_frontier(workdir / 'reward_over_kl.png', lines)
    print(describe(report, workdir))


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
