"""Figures of devices: which holds what of the weights, what preflight says of their memory and of a step's time."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from llama_jax.errors import InputError
from llama_jax.figures.chart import Chart

_GIB = 2**30
_PARTS = (
    'parameters', 'optimizer', 'kv_cache', 'gradients', 'activations', 'batch', 'temporaries', 'code', 'all_else',
)  # fmt: skip
_TERMS = {
    'compute': 'matrix products', 'hbm': 'main memory', 'ici': 'links within a slice', 'dcn': 'network between slices',
}  # fmt: skip


def layouts(arrays: Mapping[str, jax.Array], title: str = 'which device holds what') -> Chart:
    """How arrays lie on their devices: of each the last two dimensions, a colour for each part.

    Args:
      arrays: by the name that stands above; a part that several devices hold names them all.
      title: above.

    Raises:
      InputError: an array has fewer than two dimensions, or is split along an earlier one.
    """
    chart = Chart(figsize=(2.6 * len(arrays), 3.1), layout='constrained')
    for axes, (name, array) in zip(
        chart.subplots(1, len(arrays), squeeze=False)[0], arrays.items(), strict=True
    ):
        held: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            spans = tuple(part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True))
            held.setdefault(spans, []).append(device.id)
        if array.ndim < 2 or any(
            span != (0, n) for s in held for span, n in zip(s[:-2], array.shape, strict=False)
        ):
            raise InputError(
                f'{name} has shape {array.shape}, split over {len(held)}; its last two dimensions are drawn'
            )
        height, width = array.shape[-2:]
        palette = colormaps['tab20' if len(held) > 10 else 'tab10']
        for number, (spans, devices) in enumerate(sorted(held.items())):
            (top, bottom), (left, right) = spans[-2:]
            place = (left / width, top / height), (right - left) / width, (bottom - top) / height
            axes.add_patch(Rectangle(*place, facecolor=palette(number % 20), edgecolor='white', alpha=0.75))
            centre = (left + right) / 2 / width, (top + bottom) / 2 / height
            label = f'{devices[0]}-{devices[-1]}' if len(devices) > 3 else ' '.join(map(str, devices))
            axes.text(*centre, label, ha='center', va='center', fontsize=8)
        axes.set(xlim=(0, 1), ylim=(1, 0), xlabel=f'{width} columns', xticks=[], yticks=[], title=name)
        axes.set_ylabel(f'{height} rows')
    chart.suptitle(title)
    return chart


def memory_bars(memory: Mapping[str, Mapping[str, Any]], title: str = 'memory of a device') -> Chart:
    """What a step holds of each device's memory, part by part, and where the memory ends.

    Args:
      memory: of each bar, by its name, what preflight tells as `hbm`, in bytes.
      title: above.

    Raises:
      InputError: a bar tells of no part.
    """
    for name, found in memory.items():
        if not any(found.get(part) for part in _PARTS):
            raise InputError(f'{name} tells of no part of the memory; it has {", ".join(found)}')
    chart = Chart(figsize=(8, 0.7 * len(memory) + 1.7), layout='constrained')
    axes = chart.subplots()
    names, left = list(memory), np.zeros(len(memory))
    for part in _PARTS:
        sizes = np.array([memory[name].get(part, 0) / _GIB for name in names])
        if sizes.any():
            axes.barh(names, sizes, left=left, label=part.replace('_', ' '))
            left += sizes
    for row, name in enumerate(names):
        end = memory[name]['available'] / _GIB
        axes.plot([end, end], [row - 0.45, row + 0.45], color='black')
    axes.invert_yaxis()
    axes.set(xlabel='GiB; the line: what there is', title=title)
    axes.legend(fontsize=8)
    return chart


def rooflines(terms: Mapping[str, Mapping[str, Any]], title: str = 'a step takes at least') -> Chart:
    """The time that each resource needs for a step: the longest is what the step takes at least.

    Args:
      terms: of each group of bars, by its name, what preflight tells as `roofline`, in seconds.
      title: above.
    """
    known = {key: label for key, label in _TERMS.items() if any(found.get(key) for found in terms.values())}
    chart = Chart(figsize=(8, 0.5 * len(known) * len(terms) + 1.4), layout='constrained')
    axes = chart.subplots()
    thickness = 0.8 / len(terms)
    for number, (name, found) in enumerate(terms.items()):
        seconds = [found.get(key) or math.nan for key in known]
        places = np.arange(len(known)) + (number - (len(terms) - 1) / 2) * thickness
        drawn = axes.barh(places, [1e3 * value for value in seconds], 0.9 * thickness, label=name)
        axes.bar_label(
            drawn, fmt=lambda value: f' {value:,.0f}' if value >= 100 else f' {value:.3g}', fontsize=8
        )
    axes.set_yticks(range(len(known)), list(known.values()))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel='milliseconds', title=title)
    axes.legend(fontsize=8)
    return chart
