"""results.json of an evaluation, its report and its plot: what they may replace, and how they are written."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etils import epath

from experiments.launch import flags_named
from experiments.run import preference_files
from llama_jax import storage
from llama_jax.errors import InputError
from llama_jax.eval.published import Comparison, compare
from llama_jax.eval.report import plot_comparison, to_report
from llama_jax.json_file import parse_json, read_bytes

RESULTS, REPORT, PLOT = 'results.json', 'report.md', 'comparison.png'


def check_results(output: epath.Path, names: Sequence[str]) -> None:
    """Refuses a folder whose results of other tasks, or whose files of other origin, this evaluation would replace."""
    if not (file := output / RESULTS).exists():
        if strange := [name for name in (REPORT, PLOT) if (output / name).exists()]:
            raise InputError(
                f'{output / strange[0]} is of no evaluation; move it away, or choose another --output'
            )
        return
    with flags_named('--output'):
        held = parse_json(read_bytes(file), str(file))
    if not isinstance(held, dict):
        raise InputError(f'{file} is of no evaluation; move it away, or choose another --output')
    if others := [name for name in held if name not in names]:
        raise InputError(
            f'{file} has results of {", ".join(others)}, which --tasks does not name, and would lose them; name all '
            '(finished items are not asked again), or choose another --output'
        )


def write_results(
    output: epath.Path,
    checkpoint: str,
    compared_to: str,
    results: dict[str, Any],
    of_pairs: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Writes results.json, the report and the plot; returns the report."""
    storage.write_atomically(output / RESULTS, json.dumps({**results, **of_pairs}, indent=2) + '\n')
    rows: list[Comparison] = compare(compared_to, results) if compared_to else []
    title = f'Evaluation of {checkpoint}'
    report = to_report(title, results, compared_to, rows) if results else f'# {title}\n'
    if of_pairs:
        report += f'\n{preference_files.describe(of_pairs)}\n'
    storage.write_atomically(output / REPORT, report)
    if rows:
        plot_comparison(output / PLOT, compared_to, rows)
    return report
