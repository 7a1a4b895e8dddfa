"""Rejection sampling: which of many scored answers are kept, and what more of them, or hotter ones, would bring.

Llama 2 paper, section 3.2.3, with its figures 7 and 8.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from llama_jax.errors import InputError
from llama_jax.storage import write_atomically

KEEPS = ('best', 'pair', 'threshold')


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One answer to a prompt, as a file of candidates holds it.

    Attributes:
      completion: its text.
      score: what it is kept by.
      scores: each reward by its name.
      stopped: a stop token ended it.
      num_tokens: of the answer, the stop token included.
      temperature: that it was drawn at; 0 where it came from elsewhere.
      origin: the file that it came from; '': it was drawn here.
      preprompt: that it was drawn behind (`rl.context_distillation`).
    """

    completion: str
    score: float
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stopped: bool = True
    num_tokens: int = 0
    temperature: float = 0.0
    origin: str = ''
    preprompt: str = ''


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which candidates of a prompt are kept.

    Attributes:
      kind: 'best'; 'pair', the best and the worst; 'threshold', all whose score reaches it, best first.
      threshold: of the last.
    """

    kind: str = 'best'
    threshold: float | None = None

    def __post_init__(self):
        """Raises InputError where there is no such way."""
        if self.kind not in KEEPS:
            raise InputError(f'keep is {self.kind!r}; it is one of {", ".join(KEEPS)}')
        if self.kind == 'threshold' and not (self.threshold is not None and math.isfinite(self.threshold)):
            raise InputError(
                f'threshold is {self.threshold}; to keep all that reach it, it must be a finite number'
            )
        if self.kind != 'threshold' and self.threshold is not None:
            raise InputError(
                f'threshold is {self.threshold}, and what is kept is the {self.kind}; leave it out'
            )


def select(candidates: Sequence[Candidate], keep: Keep) -> list[tuple[int, ...]]:
    """Places of what is kept: of each answer to learn its own, of a pair the better and the worse.

    Answers without words are of no use to learn from; equal scores make no pair, and of equal ones the first is taken.
    """
    order = [
        i
        for i in sorted(range(len(candidates)), key=lambda i: -candidates[i].score)
        if candidates[i].completion.strip()
    ]
    if not order:
        return []
    best, worst = order[0], order[-1]
    if keep.kind == 'best':
        return [(best,)]
    if keep.kind == 'pair':
        worst = next(i for i in order if candidates[i].score == candidates[worst].score)
        differ = candidates[best].completion.strip() != candidates[worst].completion.strip()
        return [(best, worst)] if differ and candidates[best].score > candidates[worst].score else []
    assert keep.threshold is not None
    seen, kept = set(), []
    for i in order:
        if candidates[i].score >= keep.threshold and candidates[i].completion not in seen:
            seen.add(candidates[i].completion)
            kept.append((i,))
    return kept


def lines_of(prompt: Any, candidates: Sequence[Candidate], keep: Keep) -> list[dict[str, Any]]:
    """What is written of a prompt: prompt and completion to learn, beside a pair's chosen and rejected.

    The first line of a prompt holds all its candidates.
    """
    lines: list[dict[str, Any]] = []
    for places in select(candidates, keep):
        kept = [candidates[place] for place in places]
        line = {'prompt': prompt} | learnt_of(kept[0])
        if len(kept) == 2:
            line |= compared_of(*kept)
        if not lines:
            line['candidates'] = [dataclasses.asdict(one) for one in candidates]
        lines.append(line)
    return lines


def learnt_of(kept: Candidate) -> dict[str, Any]:
    """What `sft` reads of a candidate: whether it is to learn that the answer ends there, too."""
    return {'completion': kept.completion, 'stopped': kept.stopped, 'score': kept.score}


def compared_of(chosen: Candidate, rejected: Candidate) -> dict[str, Any]:
    """What `dpo` reads of two candidates, as `learnt_of`."""
    both = {'chosen': chosen, 'rejected': rejected}
    return {
        **{name: one.completion for name, one in both.items()},
        **{f'{name}_stopped': one.stopped for name, one in both.items()},
        **{f'score_{name}': one.score for name, one in both.items()},
    }


def expected_order_statistic(pool: Float[np.ndarray, ' k'], n: int, rank: int) -> float:
    """The mean, over all ways to draw `n` of the pool, of the `rank`-th smallest of them (1: the smallest)."""
    ordered, k = np.sort(np.asarray(pool, np.float64)), len(pool)
    assert 1 <= rank <= n <= k
    ways = np.array([math.comb(i, rank - 1) * math.comb(k - 1 - i, n - rank) for i in range(k)], object)
    return float(sum(int(way) * value for way, value in zip(ways, ordered, strict=True)) / math.comb(k, n))


def best_of(pool: Float[np.ndarray, ' k'], n: int) -> float:
    """The mean score of the best of `n` of the pool."""
    return expected_order_statistic(pool, n, n)


def median_of(pool: Float[np.ndarray, ' k'], n: int) -> float:
    """The mean of the median of `n` of the pool."""
    low, high = (n + 1) // 2, n // 2 + 1
    return 0.5 * (expected_order_statistic(pool, n, low) + expected_order_statistic(pool, n, high))


def best_of_n_divergence(n: int) -> float:
    """Nats from the policy to its best of `n` answers where no two scores are equal; an upper bound else."""
    return math.log(n) - (n - 1) / n


@dataclasses.dataclass(frozen=True)
class Curves:
    """Means over prompts.

    Attributes:
      numbers: N.
      best: [temperature, N], of the best of N.
      median: [temperature, N].
    """

    temperatures: tuple[float, ...]
    numbers: tuple[int, ...]
    best: Float[np.ndarray, 'temperatures N']
    median: Float[np.ndarray, 'temperatures N']


def curves(prompts: Sequence[Sequence[Candidate]]) -> Curves | None:
    """Of what was drawn here, of all prompts alike; None where nothing was."""
    pools: dict[float, list[np.ndarray]] = {}
    for candidates in prompts:
        drawn = [one for one in candidates if not one.origin and not one.preprompt]
        for temperature in sorted({one.temperature for one in drawn}):
            pools.setdefault(temperature, []).append(
                np.array([one.score for one in drawn if one.temperature == temperature])
            )
    if not pools:
        return None
    most = min(len(pool) for of_one in pools.values() for pool in of_one)
    numbers = tuple(sorted({1 << power for power in range(most.bit_length())} | {most}))
    best, median = (
        np.array(
            [
                [np.mean([of(pool, n) for pool in of_one]) for n in numbers]
                for _, of_one in sorted(pools.items())
            ]
        )
        for of in (best_of, median_of)
    )
    return Curves(tuple(sorted(pools)), numbers, best, median)


def plot_curves(path: epath.Path, found: Curves) -> None:
    """Best and median over N, and the best over temperature: figures 7 and 8 of the Llama 2 paper."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    for row, temperature in enumerate(found.temperatures):
        (line,) = left.plot(found.numbers, found.best[row], marker='o', label=f'best, T={temperature:g}')
        left.plot(found.numbers, found.median[row], linestyle=':', color=line.get_color())
    left.set_xscale('log', base=2)
    left.set(xlabel='N samples', ylabel='mean score', title='best of N; dotted: median')
    left.legend()
    for column, number in enumerate(found.numbers):
        right.plot(found.temperatures, found.best[:, column], marker='o', label=f'N={number}')
    right.set(xlabel='temperature', ylabel='mean score of the best of N', title='by temperature')
    right.legend()
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=100)
    write_atomically(path, data.getvalue())
