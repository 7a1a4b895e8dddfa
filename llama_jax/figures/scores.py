"""Figures of what was measured: scores with their intervals, sizes beside each other, and calibration."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from llama_jax.errors import InputError
from llama_jax.figures.chart import Chart

Interval = tuple[float, float]


def bars(
    values: Mapping[str, float],
    unit: str,
    title: str,
    *,
    intervals: Mapping[str, Interval] | None = None,
    marks: Mapping[str, float] | None = None,
) -> Chart:
    """A bar for each value, with its interval and a mark to compare with where there are some.

    Args:
      values: by name.
      unit: of the values.
      title: above.
      intervals: (low, high) by name, where the true values lie.
      marks: what others found, or chance, by name: a black line.
    """
    chart = Chart(figsize=(8, 0.45 * len(values) + 1.3), layout='constrained')
    axes = chart.subplots()
    names, lengths = list(values), list(values.values())
    ends = [(intervals or {}).get(name, (value, value)) for name, value in values.items()]
    errors = np.abs(np.array(ends).T - np.array(lengths)) if values else None
    colours = [f'C{number % 10}' for number in range(len(names))]
    axes.barh(names, lengths, color=colours, xerr=errors if intervals else None)
    for row, name in enumerate(names):
        if name in (marks or {}):
            place = (marks or {})[name]
            axes.plot([place, place], [row - 0.42, row + 0.42], color='black', linewidth=2)
    axes.invert_yaxis()
    axes.grid(axis='x', alpha=0.3)
    axes.set(xlabel=unit, title=title)
    return chart


def calibration(
    confidence: Float[np.ndarray, ' n'],
    right: Bool[np.ndarray, ' n'],
    num_bins: int = 8,
    title: str = 'calibration',
) -> Chart:
    """How often answers are right by how sure the model was of them; a calibrated model stays on the diagonal.

    Args:
      confidence: the probability of the answer that was taken.
      right: whether it was the right one.
      num_bins: of equal width, from 0 to 1.
      title: above; the expected calibration error (Guo et al. 2017) follows it.

    Raises:
      InputError: there is no answer, or a confidence is no probability.
    """
    sure, hits = np.asarray(confidence, float), np.asarray(right, bool)
    if not sure.size or sure.shape != hits.shape or not ((sure >= 0) & (sure <= 1)).all():
        raise InputError(
            f'confidence has shape {sure.shape}, right {hits.shape}; they are as many, at least one, and from 0 to 1'
        )
    chart = Chart(figsize=(5.5, 5), layout='constrained')
    axes, below = chart.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    place = np.minimum((sure * num_bins).astype(int), num_bins - 1)
    bins: Sequence[int] = np.unique(place).tolist()
    mean = np.array([sure[place == number].mean() for number in bins])
    share = np.array([hits[place == number].mean() for number in bins])
    count = np.array([(place == number).sum() for number in bins])
    axes.plot([0, 1], [0, 1], color='grey', linestyle=':')
    axes.plot(mean, share, marker='o')
    error = float((count * np.abs(share - mean)).sum() / len(sure))
    axes.set(ylabel='share of right answers', ylim=(0, 1), title=f'{title}; expected error {error:.3f}')
    centres = (np.array(bins) + 0.5) / num_bins
    below.bar(centres, count, 0.9 / num_bins, color='C1')
    below.set(xlabel='probability of the answer taken', ylabel='items', xlim=(0, 1))
    return chart
