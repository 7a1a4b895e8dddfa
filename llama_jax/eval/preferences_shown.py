"""How pairs of answers are ordered, as people read it: lines beside the Llama 2 paper's, and a plot."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from llama_jax.eval.preferences import Judgement
from llama_jax.storage import write_atomically

# Accuracies of the Llama 2 paper, in percent. Table 7, of its helpfulness and its safety reward model.
TABLE_7 = {
    'Meta Helpful': (63.2, 56.2), 'Meta Safety': (62.8, 64.5), 'Anthropic Helpful': (72.0, 55.4),
    'Anthropic Harmless': (71.0, 74.7), 'OpenAI Summarize': (75.5, 71.7), 'Stanford SHP': (80.0, 65.2),
}  # fmt: skip
# Table 28, by margin: significantly better, better, slightly better, negligibly better, all.
TABLE_28 = {
    'none': (79.1, 66.9, 59.8, 54.5, 62.5), 'small': (80.4, 67.3, 60.4, 55.0, 63.0),
    'large': (80.7, 67.5, 60.5, 54.3, 62.9),
}  # fmt: skip
# Table 29, without and with the auxiliary safety loss: accuracy, and recall of unsafe answers.
TABLE_29 = {'accuracy': (63.7, 64.5), 'recall_of_unsafe': (73.0, 90.4)}


def describe_preferences(report: Mapping[str, Any]) -> list[str]:
    """Accuracy in all and by part, what knows nothing beside it, and the paper's tables."""
    number, error, longer = (report[name] for name in ('pairs', 'standard_error', 'longer_is_better'))
    lines = [
        f'{"accuracy":28}{report["accuracy"]:8.3f}  of {number:,} held-out pairs (error of a coin {error:.3f})',
        f'{"the longer is better":28}{longer:8.3f}  (the shorter: {1 - longer:.3f})',
    ]
    if 'bag_of_words' in report:
        lines.append(f'{"a bag of words":28}{report["bag_of_words"]:8.3f}')
    lines.append(f'{"calibration error":28}{report["calibration_error"]:8.3f}')
    if 'recall_of_unsafe' in report:
        lines.append(f'{"recall of unsafe answers":28}{report["recall_of_unsafe"]:8.3f}')
    for name, title in (
        ('accuracy_by_margin', 'by margin'), ('accuracy_by_length_difference', 'by tokens that the better is longer'),
    ):  # fmt: skip
        parts = ', '.join(f'{part}: {value:.3f}' for part, value in report[name].items())
        lines.append(f'{title:28}{parts}')
    lines += ['', 'Llama 2 paper, of its own models and data (helpfulness, safety; in percent):']
    lines += [f'  {name:20}{helpful:6.1f}{safe:6.1f}' for name, (helpful, safe) in TABLE_7.items()]
    shown = '; '.join(f'margin {name} {values[-1]}' for name, values in TABLE_28.items())
    return [*lines, f'  by margin, Meta Helpful: {shown}', *(
        f'  {name.replace("_", " ")}, without and with the safety loss: {before}, {after}'
        for name, (before, after) in TABLE_29.items()
    )]  # fmt: skip


def describe_judged(report: Mapping[str, Any]) -> list[str]:
    """How answers that were judged alone are parted, and what their lengths alone would do."""
    number, good = report['answers'], report['good']
    return [
        f'{"good above others":28}{report["above"]:8.3f}  of {number:,} held-out answers, {good:,} of them good',
        f'{"longer above shorter":28}{report["longer_is_better"]:8.3f}',
    ]


def plot_preferences(path: epath.PathLike, found: Judgement, name: str) -> None:
    """Histograms of both answers' figures; how often the better one is, by how probable it is said to be."""
    from matplotlib.figure import Figure  # which no window shows, and which changes nothing of a notebook's

    figure = Figure(figsize=(11, 4.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    bins = np.histogram_bin_edges(found.figures, 30)
    for side, label in enumerate(('preferred', 'other')):
        left.hist(found.figures[:, side], bins, alpha=0.6, label=label)
    left.set(xlabel=name, ylabel='answers', title=f'{name.capitalize()}s')
    left.legend()
    gaps = found.figures[:, 0] - found.figures[:, 1]
    both = np.concatenate([gaps, -gaps])
    said, better = 0.5 * (1 + np.tanh(both / 2)), np.repeat([1.0, 0.0], len(gaps))
    places = np.minimum((said * 10).astype(int), 9)
    points = [(np.mean(said[places == i]), np.mean(better[places == i])) for i in np.unique(places)]
    right.plot([0, 1], [0, 1], linestyle='--', color='grey')
    right.plot(*zip(*points, strict=True), marker='o')
    right.set(xlabel='sigmoid of the difference', ylabel='share preferred', title='Calibration')
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=120)
    write_atomically(epath.Path(path), image.getvalue())
