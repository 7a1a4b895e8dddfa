"""How much reward was had for how far from the reference: what a run of policy gradients is told by."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llama_jax.storage import write_atomically


def plot_frontier(file: epath.Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Reward over the divergence from the reference, iteration by iteration; over steps where there is no reference.

    Args:
      file: a .png.
      lines: of metrics.jsonl; those without a reward are left out.
    """
    from matplotlib.figure import Figure  # it takes long to load

    found = [line for line in lines if 'reward' in line]
    by = 'kl' if all('kl' in line for line in found) else 'step'
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    axes.set(xlabel='KL to the reference, nats an answer' if by == 'kl' else 'step', ylabel='reward')
    axes.plot([line[by] for line in found], [line['reward'] for line in found], marker='.', linewidth=0.7)
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=120)
    write_atomically(file, data.getvalue())
