"""A run of policy gradients from its flags to where its loop begins: all that it reads, checked, and its workdir."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from experiments import launch, training
from experiments.policy.iterations import Iterations
from experiments.policy.memory import available_memory, check_memory, held
from experiments.policy.objective import check_policy, sampler_partitioner
from experiments.policy.prompts import read_prompts
from experiments.policy.reference import frozen_reference
from experiments.policy.rewards import check_rewards, open_rewards, parse_rewards
from experiments.run.adapters import SharedBase
from experiments.run.objective import objective_of, scored
from llama_jax import runtime
from llama_jax.data.records import check_records
from llama_jax.errors import InputError
from llama_jax.models.reward import VALUE
from llama_jax.train.optimizer import at_rate
from llama_jax.train.state import abstract_state


def begin_policy(config: ConfigDict, *, allow_code: bool, **flags: Any) -> tuple[training.Run, Iterations]:
    """(the run, what gives it minibatches): all that it needs is read.

    Args:
      config: all keys.
      allow_code: a reward may run generated programs, in a sandbox.
      flags: of `launch.define_run`.

    Raises:
      InputError: something is wrong with them, or what they name; or a device does not hold it.
    """
    with runtime.refused_by_all():
        recipe = check_policy(config)
        with launch.flags_named('--config.algorithm.rewards', '--allow_code_execution'):
            terms = parse_rewards(config.algorithm.rewards)
            check_rewards(terms, allow_code)
        if not flags['checkpoint']:
            raise InputError('a policy starts from a model: give it by --checkpoint')
    plan = training.plan(config, **flags, check_data=check_records)
    if recipe.algorithm.has_values and recipe.course.value_rate != 1:
        plan = dataclasses.replace(plan, tx=at_rate(plan.tx, VALUE, recipe.course.value_rate))
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
            allow_code=allow_code,
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
    return run, Iterations(run, scored(plan.model), sampler, prompts, judges.rewards)
