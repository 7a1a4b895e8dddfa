"""What each token of an answer was worth, beside what was to be expected: on the host, in float64, answer by answer.

An iteration's answers are lists of arrays, one a token; nothing is padded, and means are over all of them, whatever the
mesh.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from llama_jax.errors import InputError
from llama_jax.losses.policy import Algorithm

Ragged = list[np.ndarray]  # of one axis each

_STD_FLOOR = 1e-4  # added to a group's spread, as in GRPO's paper


@dataclasses.dataclass(frozen=True)
class Horizon:
    """How far what comes later counts.

    Attributes:
      discount: gamma, of a reward for each token between.
      trace: lambda, of errors in what was expected (Schulman et al. 2016); 1: what came is taken as it came.
    """

    discount: float = 1.0
    trace: float = 0.95

    def __post_init__(self):
        for name in ('discount', 'trace'):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise InputError(f'{name} is {value}; it must be from 0 to 1')


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Of every answer, by token.

    Attributes:
      advantages: what the token was worth more than was expected.
      returns: what came from it on, as values learn it: by GAE as far as `trace`, and behind that what was expected.
      came: the same to the answer's end, by Monte Carlo, whatever was expected.
    """

    advantages: Ragged
    returns: Ragged
    came: Ragged


def make_advantages(
    algorithm: Algorithm,
    scores: Float[np.ndarray, ' A'],
    away: Sequence[np.ndarray],
    *,
    beta: float,
    groups: Int[np.ndarray, ' A'],
    values: Sequence[np.ndarray] | None = None,
    horizon: Horizon = Horizon(),
) -> Advantages:
    """Advantages as an algorithm has them.

    Args:
      algorithm: which.
      scores: of the answers, each of which has at least one token.
      away: log pi_old - log pi_ref of each of their tokens, in nats.
      beta: what a nat of it costs, where that is taken from the reward.
      groups: number of the prompt that each answer is to.
      values: what was expected before each token; of GAE.
      horizon: how far what comes later counts.
    """
    rewards = token_rewards(scores, away, beta if algorithm.divergence == 'reward' else 0.0)
    returns = came = [discounted(one, horizon.discount) for one in rewards]
    match algorithm.advantage:
        case 'gae':
            assert values is not None
            pairs = zip(rewards, values, strict=True)
            found = [gae(one, expected, horizon) for one, expected in pairs]
            returns = [one + np.asarray(expected) for one, expected in zip(found, values, strict=True)]
        case 'batch_mean':
            mean = np.concatenate(returns).mean()
            found = [one - mean for one in returns]
        case kind:
            totals = np.array([one.sum() for one in rewards])
            of_answers = group_advantages(totals, groups, kind)
            found = [np.full(len(one), worth) for one, worth in zip(rewards, of_answers, strict=True)]
    return Advantages(whiten(found) if algorithm.whiten else found, returns, came)


def token_rewards(scores: Float[np.ndarray, ' A'], away: Sequence[np.ndarray], beta: float) -> Ragged:
    """What each token earns: -beta * (log pi - log pi_ref), and at the last of an answer, its stop token, the score."""
    made = []
    for score, one in zip(scores, away, strict=True):
        rewards = -beta * np.asarray(one, np.float64)
        rewards[-1] += score
        made.append(rewards)
    return made


def discounted(rewards: Float[np.ndarray, ' n'], discount: float) -> Float[np.ndarray, ' n']:
    """What came from each token on."""
    returns, later = np.empty(len(rewards)), 0.0
    for place in range(len(rewards) - 1, -1, -1):
        returns[place] = later = rewards[place] + discount * later
    return returns


def gae(
    rewards: Float[np.ndarray, ' n'], values: Float[np.ndarray, ' n'], horizon: Horizon
) -> Float[np.ndarray, ' n']:
    """Generalised advantage estimates; nothing is expected behind the last token, where an answer ends."""
    values = np.asarray(values, np.float64)
    following = np.append(values[1:], 0.0)
    return discounted(rewards + horizon.discount * following - values, horizon.discount * horizon.trace)


def whiten(values: Sequence[np.ndarray]) -> Ragged:
    """Mean 0 and variance 1 over all of them; what is all the same becomes 0."""
    together = np.concatenate([np.asarray(one, np.float64) for one in values])
    if np.all(together == together[:1]):
        return [np.zeros(len(one)) for one in values]
    mean, std = together.mean(), together.std()
    return [(one - mean) / std for one in values]


def group_advantages(
    totals: Float[np.ndarray, ' A'], groups: Int[np.ndarray, ' A'], kind: str
) -> Float[np.ndarray, ' A']:
    """What each answer was worth beside those to the same prompt; exactly 0 where all were worth the same."""
    made = np.zeros(len(totals))
    for group in np.unique(groups):
        own = groups == group
        of_group, number = totals[own], int(own.sum())
        if number < 2 or np.all(of_group == of_group[0]):
            continue
        above = of_group - of_group.mean()
        if kind == 'leave_one_out':
            above = above * (number / (number - 1))
        elif kind == 'group_std':
            above = above / (of_group.std(ddof=1) + _STD_FLOOR)
        made[own] = above
    return made


def differing(scores: Float[np.ndarray, ' A'], groups: Int[np.ndarray, ' A']) -> set[int]:
    """The groups whose scores are not all the same: the others teach nothing."""
    return {int(one) for one in np.unique(groups) if np.ptp(scores[groups == one]) > 0}


def truncated_importance(old: Sequence[np.ndarray], sampled: Sequence[np.ndarray], limit: float) -> Ragged:
    """How much likelier each token was to the policy than to its sampler, at most `limit` (Ionides 2008)."""
    pairs = zip(old, sampled, strict=True)
    return [
        np.minimum(np.exp(np.asarray(a, np.float64) - np.asarray(b, np.float64)), limit) for a, b in pairs
    ]


def explained_variance(values: Sequence[np.ndarray], returns: Sequence[np.ndarray]) -> float:
    """The share of the returns' variance that was expected; 0 where they are all the same."""
    expected, came = np.concatenate(list(values)), np.concatenate(list(returns))
    variance = float(np.var(came))
    return 1.0 - float(np.var(came - expected)) / variance if variance > 0 else 0.0


def value_slope(values: Sequence[np.ndarray], returns: Sequence[np.ndarray]) -> float:
    """What values are multiplied by to explain most of what came: the slope of the least squares line.

    The line's level is left out, for it explains no variance. 0 where the values say nothing of what came: they are all
    the same, to what float32 rounds, or are the higher the less came. Scaled so they explain the square of their
    correlation with the returns, and never less than the nothing that 0 explains.
    """
    expected, came = (np.concatenate(list(some)).astype(np.float64) for some in (values, returns))
    if np.ptp(expected) <= 1e-5 * np.abs(expected).max():
        return 0.0
    expected = expected - expected.mean()
    return max(float(expected @ (came - came.mean()) / (expected @ expected)), 0.0)


def next_beta(beta: float, divergence: float, target: float, horizon: float | int) -> float:
    """What a nat costs from now on, so that answers come to be `target` nats away (Ziegler et al. 2019).

    Args:
      beta: until now.
      divergence: of an answer, in nats.
      target: of it.
      horizon: iterations in which it may change by a fifth.
    """
    error = min(max(divergence / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error / horizon)
