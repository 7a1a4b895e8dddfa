"""Results as people read them: a table, the same beside published scores, and a plot of the two."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from llama_jax.eval.published import Comparison, binomial_interval, is_share, to_markdown
from llama_jax.eval.tasks import find_task
from llama_jax.storage import write_atomically

if TYPE_CHECKING:
    from llama_jax.figures.chart import Chart

Results = Mapping[str, Mapping[str, Any]]

# What stands in results beside the metrics.
_COUNTS = ('n', 'num_fewshot', 'num_samples', 'truncated')


def result_lines(results: Results) -> list[str]:
    """A Markdown table of the main metrics; those of single subjects and the like are in results.json."""
    lines = ['| task | metric | value | shots | n |', '|---|---|---|---|---|']
    for name, found in results.items():
        named = [metric for metric in find_task(name).metrics if metric in found]
        for metric in named or [metric for metric in found if metric not in _COUNTS]:
            value, count = found[metric], int(found['n'])
            shown = f'{value:.4f}'
            if is_share(metric, found.get('num_samples', 1)) and count:
                low, high = binomial_interval(value, count)
                shown += f' ({low:.4f} to {high:.4f})'
            lines.append(f'| {name} | {metric} | {shown} | {found["num_fewshot"]} | {count:,} |')
    return lines


def to_report(title: str, results: Results, compared_to: str, rows: Sequence[Comparison]) -> str:
    """The Markdown page.

    Args:
      title: what was evaluated.
      results: {task: metrics}.
      compared_to: name of the published model; '' for none.
      rows: the comparison with it.
    """
    lines = result_lines(results)
    parts = [f'# {title}', '\n'.join(lines)]
    if any(re.search(r'\d to \d\.\d{4}\) \|', line) for line in lines):
        parts.append('In brackets: the 95 % interval of shares.')
    cut = {name: found['truncated'] for name, found in results.items() if found.get('truncated')}
    if cut:
        counts = ', '.join(f'{name} {count:,}' for name, count in cut.items())
        parts.append(f'Items whose context was longer than the model reads and lost its left end: {counts}.')
    if compared_to:
        parts += [f'## Beside the published scores of {compared_to}, in percent', to_markdown(rows)]
    return '\n\n'.join(parts).rstrip() + '\n'


def comparison_chart(compared_to: str, rows: Sequence[Comparison]) -> 'Chart':
    """Ours, with its interval, beside theirs: what a notebook shows.

    Args:
      compared_to: name of the published model.
      rows: the comparison with it.
    """
    from llama_jax.figures.chart import Chart  # it takes long to load

    chart = Chart(figsize=(8, 1.5 + 0.45 * len(rows)), layout='constrained')
    axes = chart.subplots()
    places = range(len(rows))
    ours = [100 * row.ours for row in rows]
    bounds = [row.interval or (row.ours, row.ours) for row in rows]
    errors = [
        [value - 100 * low for value, (low, _) in zip(ours, bounds, strict=True)],
        [100 * high - value for value, (_, high) in zip(ours, bounds, strict=True)],
    ]
    axes.barh([place - 0.2 for place in places], ours, 0.38, xerr=errors, label='ours (95 % interval)')
    theirs = [100 * row.published.value for row in rows]
    axes.barh([place + 0.2 for place in places], theirs, 0.38, label=f'{compared_to}, published')
    marks = ['' if row.same_protocol else '*' for row in rows]
    names = [
        f'{row.published.task}{mark}\n{row.published.metric}' for row, mark in zip(rows, marks, strict=True)
    ]
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    starred = ' (* another protocol)' if any(marks) else ''
    axes.set(xlabel='percent', title=f'Beside {compared_to}{starred}')
    axes.grid(axis='x', alpha=0.3)
    chart.legend(loc='outside lower center', ncols=2)  # within, it would hide bars
    return chart


def plot_comparison(path: epath.PathLike, compared_to: str, rows: Sequence[Comparison]) -> None:
    """Draws ours beside theirs, as a PNG."""
    write_atomically(epath.Path(path), comparison_chart(compared_to, rows)._repr_png_())
