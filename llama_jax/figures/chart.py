"""A figure that shows itself in a notebook, a page of HTML, a matrix in colours, curves over steps."""

import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from llama_jax.errors import InputError


class Chart(Figure):
    """A figure that a notebook shows whatever backend it has."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format='png', dpi=100)
        return image.getvalue()


@dataclasses.dataclass(frozen=True)
class Page:
    """A piece of HTML; printed, it is its plain text."""

    source: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.source


def heat_map(
    values: Float[np.ndarray, 'rows columns'],
    title: str,
    unit: str,
    columns: str,
    rows: str,
    column_labels: Sequence[str] = (),
) -> Chart:
    """A matrix in colours.

    Args:
      values: any.
      title: above.
      unit: of the values.
      columns: what stands side by side.
      rows: what stands below each other.
      column_labels: names of the columns.
    """
    height, width = np.shape(values)
    chart = Chart(figsize=(min(12, 0.5 * width + 2.5), min(10, 0.4 * height + 1.8)), layout='constrained')
    axes = chart.subplots()
    drawn = axes.imshow(np.asarray(values), aspect='auto', cmap='viridis')
    axes.set(xlabel=columns, ylabel=rows, title=title)
    axes.set_yticks(range(height))
    if column_labels:
        axes.set_xticks(range(width), column_labels, rotation=60, ha='right', fontsize=8)
    chart.colorbar(drawn, ax=axes, label=unit)
    return chart


def curves(
    figures: Mapping[str, Sequence[float]], units: Mapping[str, str], title: str = 'training'
) -> Chart:
    """A run's figures over its steps, one above the other.

    Args:
      figures: columns with 'step' among them, as `train.metrics.metrics` gives them.
      units: of the columns to draw, by name.
      title: above.

    Raises:
      InputError: there is no such column.
    """
    if missing := [name for name in ('step', *units) if name not in figures]:
        raise InputError(f'figures have no column {missing[0]!r}; they have {", ".join(figures)}')
    chart = Chart(figsize=(7, 2 * len(units) + 0.6), layout='constrained')
    panels = chart.subplots(len(units), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, unit) in zip(panels, units.items(), strict=True):
        values = np.asarray(figures[name], float)
        known = np.isfinite(values)
        axes.plot(np.asarray(figures['step'])[known], values[known], marker='.' if known.sum() < 60 else '')
        axes.set_ylabel(f'{name.replace("_", " ")}\n({unit})')
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel('step')
    chart.suptitle(title)
    return chart


def plain(text: str) -> str:
    """In letters that every font has, none of which is mathematics to matplotlib."""
    return ascii(text)[1:-1].replace('$', r'\$')
