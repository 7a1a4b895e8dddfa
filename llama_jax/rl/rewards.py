"""What an answer is worth: rewards by any number of judges, each kept apart, and their weighted sum.

A reward judges many answers at once, each by itself but for what is whitened. One that is no finite number stops
everything and names the record: an average would hide it.
"""

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from llama_jax.errors import InputError, error_line
from llama_jax.json_file import show_json
from llama_jax.rl.advantages import whiten
from llama_jax.rl.rollout import Rollout

Record = Mapping[str, Any]
# (answers, the record of each) -> what each is worth.
Reward = Callable[[Sequence[Rollout], Sequence[Record]], Float[np.ndarray, ' n']]

# Llama 2 paper, section 3.2.3: below it an answer is taken for unsafe, and the safety model judges it.
UNSAFE_BELOW = 0.15
# The key of a record that is known to be about safety.
SAFETY_KEY = 'safety'


@dataclasses.dataclass(frozen=True)
class Weighted:
    """One term of the sum.

    Attributes:
      name: that it is logged by.
      reward: judges.
      weight: is multiplied with it.
    """

    name: str
    reward: Reward
    weight: float = 1.0

    def __post_init__(self):
        """Raises InputError where the weight is no number."""
        if not math.isfinite(self.weight):
            raise InputError(f'the weight of the reward {self.name} is {self.weight}; it must be finite')


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """What some answers are worth.

    Attributes:
      total: the weighted sum.
      parts: each term by its name, before its weight.
    """

    total: Float[np.ndarray, ' n']
    parts: dict[str, Float[np.ndarray, ' n']]


def judge(rewards: Sequence[Weighted], rollouts: Sequence[Rollout], records: Sequence[Record]) -> Rewarded:
    """All rewards of some answers.

    Args:
      rewards: at least one, of different names.
      rollouts: answers.
      records: of the prompt of each; a reward of one's own reads from it what it needs.

    Raises:
      InputError: a reward gave another number of values, or one that is not finite; the record is named.
    """
    assert rewards and len(rollouts) == len(records)
    parts, total = {}, np.zeros(len(rollouts))
    for term in rewards:
        assert term.name not in parts, 'rewards are told apart by their names'
        found = np.asarray(term.reward(rollouts, records), np.float64)
        if found.shape != (len(rollouts),):
            raise InputError(
                f'the reward {term.name} gave values of shape {list(found.shape)} for {len(rollouts)} answers, the '
                f'first of {name_of(rollouts[0])}; it must give one each'
            )
        if len(wrong := np.flatnonzero(~np.isfinite(found))):
            first = int(wrong[0])
            raise InputError(
                f'the reward {term.name} is {found[first]} for {name_of(rollouts[first])}, and so for {len(wrong)} of '
                f'{len(rollouts)} answers; it must be a finite number'
            )
        parts[term.name] = found
        total += term.weight * found
    return Rewarded(total, parts)


def name_of(rollout: Rollout) -> str:
    """An answer as people find it."""
    return f'record {rollout.record}, answer {rollout.sample} ({show_json(rollout.text)})'


def missing_stop(rollouts: Sequence[Rollout], records: Sequence[Record]) -> Float[np.ndarray, ' n']:
    """-1 for an answer that nothing but its length has ended, whatever the stop tokens are."""
    return np.array([0.0 if one.stopped else -1.0 for one in rollouts])


def overlong(max_new_tokens: int, buffer: int) -> Reward:
    """Soft: 0 for answers up to `buffer` tokens short of the most, then down to -1 there (DAPO, equation 13).

    Raises:
      InputError: the buffer is none, or more than an answer may have.
    """
    if not 0 < buffer <= max_new_tokens:
        raise InputError(f'the buffer of overlong is {buffer} tokens; it must be from 1 to {max_new_tokens}')

    def reward(rollouts: Sequence[Rollout], records: Sequence[Record]) -> Float[np.ndarray, ' n']:
        lengths = np.array([len(one.answer) for one in rollouts], np.float64)
        return np.clip((max_new_tokens - buffer - lengths) / buffer, -1.0, 0.0)

    return reward


def safety_first(
    helpfulness: Reward, safety: Reward, *, threshold: float = UNSAFE_BELOW, whitened: bool = True
) -> Reward:
    """R_c of the Llama 2 paper, as whiten(logit(R_c)).

    The safety model's where the record is tagged (`SAFETY_KEY`) or its sigmoid is below the threshold, else the
    helpfulness model's. Scores are before the sigmoid, of which the logit is the inverse: they are taken as they are.

    Args:
      helpfulness: scores by one reward model.
      safety: by the other, which was trained to be below 0 for what is unsafe.
      threshold: of sigmoid(safety).
      whitened: over all answers that are judged together, else not: where each is to be judged by itself.
    """

    def reward(rollouts: Sequence[Rollout], records: Sequence[Record]) -> Float[np.ndarray, ' n']:
        helpful, safe = (np.asarray(of(rollouts, records), np.float64) for of in (helpfulness, safety))
        combined = combine_scores(helpful, safe, records, threshold)
        return whiten([combined])[0] if whitened else combined

    return reward


def combine_scores(
    helpful: Float[np.ndarray, ' n'],
    safe: Float[np.ndarray, ' n'],
    records: Sequence[Record],
    threshold: float = UNSAFE_BELOW,
) -> Float[np.ndarray, ' n']:
    """R_c before it is whitened, of both models' scores; see `safety_first`."""
    assert 0 < threshold < 1
    tagged = np.array([_is_tagged(record) for record in records], bool)
    return np.where(tagged | (safe < math.log(threshold / (1 - threshold))), safe, helpful)


def _is_tagged(record: Record) -> bool:
    tag = record.get(SAFETY_KEY, False)
    if not isinstance(tag, bool):
        raise InputError(f'{SAFETY_KEY} of a record is {show_json(tag)}; it is true or false')
    return tag


def function_of_file(path: str, name: str) -> Reward:
    """The reward that a function of a Python file gives: function(prompt, answer, record) -> float.

    The prompt is a text, or the messages of a conversation of several; the record is all that its line holds.

    Raises:
      InputError: there is no such file or function, or it raises; then and when it is called, with the record's number.
    """
    function = _load(path, name)

    def reward(rollouts: Sequence[Rollout], records: Sequence[Record]) -> Float[np.ndarray, ' n']:
        found = np.zeros(len(rollouts))
        for place, (rollout, record) in enumerate(zip(rollouts, records, strict=True)):
            try:
                value = function(record['prompt'], rollout.text, record)
            except Exception as error:  # a function may raise anything
                raise InputError(
                    f'{path}:{name} raised {type(error).__name__} ({error_line(error)}) for {name_of(rollout)}'
                ) from error
            if np.ndim(value) != 0 or np.asarray(value).dtype.kind not in 'biuf':
                raise InputError(
                    f'{path}:{name} gave {str(value)[:60]!r} for {name_of(rollout)}; it must give one number'
                )
            found[place] = float(value)
        return found

    return reward


def _load(path: str, name: str) -> Callable[..., Any]:
    if not pathlib.Path(path).is_file():
        raise InputError(f'no file {path}; a reward of your own is FILE.py:function')
    spec = importlib.util.spec_from_file_location(f'reward_{pathlib.Path(path).stem}', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f'{path} raised {type(error).__name__} when it was read: {error_line(error)}'
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = sorted(
            key for key, value in vars(module).items() if callable(value) and not key.startswith('_')
        )
        raise InputError(
            f'{path} has no function {name}; {"it has " + ", ".join(known) if known else "it has none"}'
        )
    return found
