"""Files of pairs that a checkpoint orders: --tasks=preference:FILE of `evaluate`.

A reward model gives scores; a policy log-probabilities of the answers: summed, by token (mean), and by how much the
prompt makes an answer likelier (relative): log p(answer | prompt) - log p(answer), without a prompt behind its first
token alone.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from llama_jax import storage
from llama_jax.data.preference_dataset import Reading
from llama_jax.data.preferences import EncodedPair, PreferenceRows
from llama_jax.eval.preferences import answer_figures, folded_bag_of_words, judge, preference_report
from llama_jax.eval.preferences_shown import describe_preferences, plot_preferences
from llama_jax.losses.dpo import PreferenceLoss, answer_log_probabilities
from llama_jax.losses.reward import pair_scores
from llama_jax.partitioning import Partitioner
from llama_jax.tokenizer.chat_format import chat_format_for
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params, PreferenceBatch

PREFIX = 'preference:'


def split_tasks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files of pairs, the other tasks), each once."""
    files = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return list(dict.fromkeys(files)), [name for name in names if not name.startswith(PREFIX)]


def read_pairs(
    files: Sequence[str], tokenizer: Tokenizer, format_name: str, on_error: str, seq_len: int, limit: int
) -> dict[str, PreferenceRows]:
    """The pairs of each file as rows of so many tokens, the first ones where there is a limit.

    Raises:
      InputError: a file cannot be read, a record is bad, or no row holds any pair.
    """
    found = {}
    for file in files:
        reading = Reading(tokenizer, chat_format_for(tokenizer, format_name), seq_len, on_error=on_error)
        pairs = reading.pairs([file])
        found[file] = reading.rows(pairs[:limit] if limit else pairs, file)
    return found


def figures_of(
    model: Any, params: Params, partitioner: Partitioner, rows: PreferenceRows, batch_tokens: int
) -> dict[str, np.ndarray]:
    """What both answers of each pair are given, [pairs, 2], by name; NaN of pairs that no row holds."""
    if model.config.scalar_head:
        return {'score': _answer_figures(model, params, partitioner, rows, batch_tokens)}
    alone = [dataclasses.replace(pair, prompt=pair.prompt[:1]) for pair in rows.pairs]
    summed, without = (
        _answer_figures(model, params, partitioner, some, batch_tokens)
        for some in (rows, PreferenceRows(alone, rows.seq_len))
    )
    counts = np.array([[answer.counts.sum() for answer in pair.answers if answer] for pair in rows.pairs])
    return {'summed': summed, 'mean': summed / np.maximum(counts, 1), 'relative': summed - without}


def _answer_figures(
    model: Any, params: Params, partitioner: Partitioner, rows: PreferenceRows, batch_tokens: int
) -> np.ndarray:
    parts = partitioner.axis_size('batch')
    batch_size = max(1, min(batch_tokens // rows.seq_len, len(rows)) // parts) * parts
    target = PreferenceBatch.abstract(
        batch_size, rows.seq_len, rows.num_pairs, partitioner.batch_sharding(batch_size, rows.seq_len),
        partitioner.sharding(('batch',)),
    )  # fmt: skip
    if model.config.scalar_head:
        step = functools.partial(pair_scores, model)
    else:
        step = answer_log_probabilities(model, PreferenceLoss())
    compiled = jax.jit(step, out_shardings=partitioner.sharding())
    with jax.set_mesh(partitioner.mesh):
        return answer_figures(functools.partial(compiled, params), rows, target)


def report(rows: PreferenceRows, figures: dict[str, np.ndarray]) -> dict[str, Any]:
    """What results.json says of a file: how many pairs, and by each figure how well they are ordered."""
    bag = folded_bag_of_words(rows.pairs)
    found = {name: preference_report(judge(rows.pairs, values)) | bag for name, values in figures.items()}
    shown = {f'accuracy_{name}': of_it['accuracy'] for name, of_it in found.items()}
    return {'n': next(iter(found.values()))['pairs'], **shown, **found}


def write(output: epath.Path, file: str, rows: PreferenceRows, figures: dict[str, np.ndarray]) -> None:
    """Plots, and each pair with its figures."""
    name = f'{PREFIX}{file}'.replace('/', '_').replace(':', '_')
    for figure, values in figures.items():
        plot_preferences(output / f'{name}_{figure}.png', judge(rows.pairs, values), figure)
    lines = [_line(i, pair, figures) for i, pair in enumerate(rows.pairs)]
    folder = output / 'samples'
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(folder / f'{name}.jsonl', ''.join(lines))


def _line(number: int, pair: EncodedPair, figures: dict[str, np.ndarray]) -> str:
    lengths = [len(answer.tokens) for answer in pair.answers if answer]
    given = {
        name: [float(x) if np.isfinite(x) else None for x in values[number]]
        for name, values in figures.items()
    }
    return json.dumps({'index': number, 'margin': pair.margin, 'tokens': lengths, **given}) + '\n'


def describe(results: Mapping[str, Any]) -> str:
    """The reports of all files as people read them."""
    parts = []
    for task, found in results.items():
        for name, of_it in found.items():
            if isinstance(of_it, dict):
                parts.append(
                    '\n'.join([f'## {task}, by {name}', '', '```', *describe_preferences(of_it), '```'])
                )
    return '\n\n'.join(parts)
