"""Several ways to more reward beside how far each goes from the base: the figures of docs/reinforcement.md."""

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from llama_jax.rl.rejection import best_of_n_divergence

_MOST_SAMPLES = 4096


def least_divergence(share: float, first: float) -> float:
    """Nats that any policy is away of whose answers such a share is good, where of the reference's `first` is.

    That of two Bernoullis; pi_ref exp(r / beta) / Z is no farther, nor is the best of n.

    Args:
      share: of the policy, in [0, 1].
      first: of the reference, in (0, 1).
    """
    parts = (share, first), (1 - share, 1 - first)
    return math.fsum(p * math.log(p / q) for p, q in parts if p)


def plot_ways(
    file: pathlib.Path,
    ways: Mapping[str, Sequence[tuple[float, float]]],
    unit: str,
    first: float | None = None,
) -> None:
    """A figure of answers over the divergence, of several ways or several figures of one.

    Args:
      file: a .png.
      ways: by name, (nats an answer, figure) one after the other.
      unit: what the figure is.
      first: where it is a share of good answers, that of the base, in (0, 1): the least divergence that shares have is
        drawn beside, and that of the best of n where no two scores are equal.
    """
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    axes.set(xlabel='KL to the base, nats an answer', ylabel=unit)
    if first is not None:
        shares = np.linspace(first, 1.0, 200)
        axes.plot(
            [least_divergence(one, first) for one in shares], shares, color='black', label='least for a share'
        )
        # Up to where hardly one in a thousand is not good: farther out there is nothing to see.
        enough = math.ceil(math.log(1e-3) / math.log1p(-first))
        numbers = np.unique(np.geomspace(1, min(enough, _MOST_SAMPLES), 60).astype(int)).tolist()
        best = [(best_of_n_divergence(n), 1 - (1 - first) ** n) for n in numbers]
        axes.plot(
            *zip(*best, strict=True), color='black', linestyle=':', label='best of n, log n - (n - 1) / n'
        )
    for name, points in ways.items():
        axes.plot(*zip(*points, strict=True), marker='.', linewidth=0.7, label=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
