"""Rewards as a command line or a configuration names them, by commas, each with =WEIGHT behind it or a weight of 1.

CKPT                  a reward model: its score
helpfulness:CKPT      with the next: Llama 2's R_c, either's score (`rl.rewards.safety_first`)
safety:CKPT
task:NAME[:METRIC]    of `experiments.evaluate`: what it grades the answer, of a record with the task's own keys
FILE.py:function      function(prompt, answer, record) -> float
missing_stop          -1 for an answer that was cut
overlong:TOKENS       soft: down to -1 over the last so many tokens
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.run.adapters import SharedBase
from experiments.run.config_file import split_list
from experiments.run.record import recorded_config
from llama_jax import pretrained
from llama_jax.errors import InputError, error_line
from llama_jax.eval.task import Completion, Completions, Graders, Task
from llama_jax.eval.tasks import find_task
from llama_jax.grading.sandbox import CodeExecution
from llama_jax.models.llama import abstract_params_and_axes
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.partitioning import Partitioner
from llama_jax.rl.reward_model import ModelReward
from llama_jax.rl.rewards import (
    Record,
    Reward,
    Weighted,
    function_of_file,
    missing_stop,
    name_of,
    overlong,
    safety_first,
)
from llama_jax.rl.rollout import Rollout
from llama_jax.tokenizer.protocol import Tokenizer, check_same_ids
from llama_jax.types import Params

_PREFIXES = ('helpfulness', 'safety', 'task', 'overlong')
_GRADING_THREADS = 4

logger = logging.getLogger('llama_jax.rewards')


@dataclasses.dataclass(frozen=True)
class Term:
    """One reward as it was named.

    Attributes:
      kind: 'model', 'function', 'missing_stop', or one of the prefixes.
      target: what stands behind the prefix.
      weight: in the sum.
    """

    kind: str
    target: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        """That it is logged by."""
        return f'{self.kind}:{self.target}' if self.kind in _PREFIXES else self.target


def parse_rewards(text: str) -> list[Term]:
    """The terms of a list such as 'runs/helpful,missing_stop=0.5'.

    Raises:
      InputError: there is none, one is named twice, or helpfulness and safety do not come together.
    """
    terms = [_term(part) for part in split_list(text)]
    if not terms:
        raise InputError(
            'rewards are empty; name at least one: a reward model, task:NAME, FILE.py:function, missing_stop'
        )
    names = [term.name for term in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f'rewards name {twice[0]} twice; give it once, with a weight')
    both = [[term for term in terms if term.kind == kind] for kind in ('helpfulness', 'safety')]
    if len(both[0]) != len(both[1]) or len(both[0]) > 1:
        raise InputError(
            f'rewards name helpfulness {len(both[0])} times and safety {len(both[1])} times; they are one reward '
            "(Llama 2's R_c), of one model each"
        )
    if both[0] and both[0][0].weight != both[1][0].weight:
        raise InputError(
            f'the weights of helpfulness and safety are {both[0][0].weight:g} and {both[1][0].weight:g}; they are one '
            'reward, so give both the same'
        )
    return terms


def _term(text: str) -> Term:
    what, weight = _weighted(text)
    if not math.isfinite(weight):
        raise InputError(f'the weight of {what} is {weight}; it must be finite')
    kind, colon, target = what.partition(':')
    if colon and kind in _PREFIXES:
        if not target:
            raise InputError(f'the reward {text!r} names nothing behind {kind}:')
        return Term(kind, target, weight)
    if what == 'missing_stop':
        return Term(what, what, weight)
    return Term('function' if '.py:' in what else 'model', what, weight)


def _weighted(text: str) -> tuple[str, float]:
    """(the reward, its weight): '=NUMBER' at the end is a weight, but where the whole is a path that is there."""
    what, equals, given = text.rpartition('=')
    try:
        weight = float(given if equals else 'none')
    except ValueError:  # a path with '=' in it
        return text.strip(), 1.0
    what, whole = what.strip(), _path_of(text.strip())
    if not whole or not epath.Path(whole).exists():
        return what, weight
    if epath.Path(_path_of(what)).exists():
        raise InputError(
            f'the reward {text!r} is a path, and {what!r} is one too, behind which {given} would be a weight; write '
            f'{text}=1 or {what}/={given}'
        )
    return text.strip(), 1.0


def _path_of(reward: str) -> str:
    """Of a reward model on this machine or in a bucket; '' where it is no path."""
    kind, _, target = reward.partition(':')
    if kind in _PREFIXES:
        return target if kind in ('helpfulness', 'safety') else ''
    return '' if kind in ('hf', 'missing_stop') or '.py:' in reward else reward


@dataclasses.dataclass(frozen=True)
class Judges:
    """Rewards that can be called, and what tells them from others.

    Attributes:
      rewards: the terms of the sum.
      identity: {name: of what its values follow from}.
      weights: of reward models, by name.
    """

    rewards: list[Weighted]
    identity: dict[str, Any]
    weights: dict[str, Params]


def check_rewards(terms: Sequence[Term], allow_code: bool) -> None:
    """What is wrong with rewards by themselves, before anything is loaded.

    Raises:
      InputError: as said.
    """
    if all(term.kind in ('missing_stop', 'overlong') for term in terms):
        logger.warning(
            'rewards are %s alone: they punish an answer for its end or length, and nothing rewards what it says; '
            'name a reward model, task:NAME or FILE.py:function beside them',
            ','.join(term.name for term in terms),
        )
    for term in terms:
        if term.kind == 'function':
            function_of_file(*term.target.rsplit(':', 1))
        elif term.kind == 'task':
            task_reward(term.target, Graders(CodeExecution(allowed=True) if allow_code else None))
        elif term.kind in ('model', 'helpfulness', 'safety'):
            opened = pretrained.open(term.target)
            if not opened.config.scalar_head:
                raise InputError(
                    f'the reward model {term.target} has no score: it is a language model; train one from it with '
                    'experiments.reward_model'
                )
            if term.kind == 'safety':
                _check_threshold(term.target, opened)


def open_rewards(
    terms: Sequence[Term],
    *,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    partitioner: Partitioner | None = None,
    dtype: Any = jnp.float32,
    allow_code: bool = False,
    whitened: bool = True,
    shared: SharedBase | None = None,
) -> Judges:
    """Rewards, their models loaded.

    Args:
      terms: as `parse_rewards` gives them.
      tokenizer: of the policy, which reward models must have too.
      max_new_tokens: of an answer.
      partitioner: places the models.
      dtype: that they compute in.
      allow_code: tasks may run generated programs, in a sandbox.
      whitened: see `rl.rewards.safety_first`.
      shared: weights that are there already; a reward model of adapters beside them is not read whole.

    Raises:
      InputError: one cannot be opened, is no reward model, or has another tokenizer.
    """
    rewards: list[Weighted] = []
    identity: dict[str, Any] = {}
    models: dict[str, Reward] = {}
    weights: dict[str, Params] = {}
    for term in terms:
        known: Any = term.weight
        match term.kind:
            case 'model' | 'helpfulness' | 'safety':
                reward, fingerprint = _model(term, tokenizer, partitioner, dtype, shared)
                known, weights[term.name] = [term.weight, fingerprint], reward.params
                if term.kind != 'model':
                    models[term.kind] = reward
                    identity[term.name] = known
                    if len(models) == 2:
                        combined = safety_first(models['helpfulness'], models['safety'], whitened=whitened)
                        rewards.append(Weighted('safety_first', combined, term.weight))
                    continue
            case 'task':
                reward = task_reward(
                    term.target, Graders(CodeExecution(allowed=True) if allow_code else None)
                )
            case 'function':
                path, _, function = term.target.rpartition(':')
                reward = function_of_file(path, function)
                known = [term.weight, hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()]
            case 'overlong':
                if not term.target.isdecimal():
                    raise InputError(
                        f'overlong is {term.target!r}; it is a number of tokens, as in overlong:64'
                    )
                reward = overlong(max_new_tokens, int(term.target))
            case _:
                reward = missing_stop
        rewards.append(Weighted(term.name, reward, term.weight))
        identity[term.name] = known
    return Judges(rewards, identity, weights)


def _model(
    term: Term, tokenizer: Tokenizer, partitioner: Partitioner | None, dtype: Any, shared: SharedBase | None
) -> tuple[ModelReward, str]:
    opened = pretrained.open(term.target)
    if opened.tokenizer is not None:
        check_same_ids(tokenizer, opened.tokenizer, f'the reward model {term.target}')
    elif opened.config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f'the reward model {term.target} has no tokenizer, and {opened.config.vocab_size} ids, the policy '
            f'{tokenizer.vocab_size}; it must have the tokenizer of the policy'
        )
    model = LlamaForRewardModel(opened.config, dtype=dtype, partitioner=partitioner)
    if partitioner is not None:
        shapes, axes = abstract_params_and_axes(model)
        partitioner.tree_shardings(shapes, axes)  # before anything is loaded
        if shared is not None and shared.is_of(opened):
            logger.info("%s is adapters beside the policy's base, which it shares", term.target)
            return ModelReward(model, shared.model_of(opened, shapes, axes, partitioner)), opened.fingerprint
    _, params, _ = pretrained.load(opened, partitioner=partitioner, dtype=jnp.dtype(dtype))
    return ModelReward(model, params), opened.fingerprint


def _check_threshold(path: str, opened: pretrained.Checkpoint) -> None:
    """0.15 says something of scores that were trained to be below 0 for what is unsafe."""
    if (config := recorded_config(opened)) is None:
        logger.warning('%s does not say how it was trained; its scores are taken to be those of safety', path)
        return
    if not config.get('reward.safety'):
        raise InputError(
            f'the reward model {path} was trained without the loss of safe and unsafe answers (reward.safety 0), so '
            'that no score of it means unsafe; train it with that, or name it as a reward by itself'
        )


def task_reward(name: str, graders: Graders) -> Reward:
    """What a task of `eval` grades an answer, by its first metric or the one that is named.

    Raises:
      InputError: there is no such task or metric, or it needs what is not there.
    """
    name, _, metric = name.partition(':')
    task = find_task(name)
    task.check(graders)
    metric = metric or task.metrics[0]

    def reward(rollouts: Sequence[Rollout], records: Sequence[Record]) -> np.ndarray:
        grade: Callable[..., float] = lambda one, record: _grade(task, metric, one, record, graders)  # noqa: E731
        with ThreadPoolExecutor(_GRADING_THREADS) as pool:
            return np.array(list(pool.map(grade, rollouts, records)), np.float64)

    return reward


def _grade(task: Task, metric: str, rollout: Rollout, record: Record, graders: Graders) -> float:
    try:
        requests = task.requests(dict(record))
        if len(requests) != 1 or not isinstance(asked := requests[0], Completion):
            raise InputError(
                f'task {task.name} compares given texts; a reward is of one whose answer is generated'
            )
        ends = [place for stop in asked.stop if (place := rollout.text.find(stop)) >= 0]
        text = rollout.text[: min(ends, default=len(rollout.text))]
        scores = task.grade(dict(record), [Completions((text,))], graders)
    except InputError:
        raise
    except Exception as error:  # of many kinds: what a grader makes of a record that is not of its task
        raise InputError(
            f'task {task.name} cannot grade {name_of(rollout)}: {type(error).__name__} ({error_line(error)}); its '
            'record must have the keys of that benchmark'
        ) from error
    value = scores.get(metric)
    if value is None or isinstance(value, str):
        numbers = [key for key, score in scores.items() if not isinstance(score, str)]
        raise InputError(f'task {task.name} has no metric {metric!r}; it has {", ".join(numbers)}')
    return float(value)
