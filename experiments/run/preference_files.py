"""Files of pairs that a checkpoint orders: --tasks=preference:FILE of `evaluate`.

A reward model gives scores; a policy log-probabilities of the answers: summed, by token (mean), and by how much the
prompt makes an answer likelier (relative): log p(answer | prompt) - log p(answer), without a prompt behind its first
token alone.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from llama_jax import storage
from llama_jax.data.preference_dataset import Reading
from llama_jax.data.preferences import EncodedPair, PreferenceRows
from llama_jax.errors import InputError
from llama_jax.eval.preferences import answer_figures, folded_bag_of_words, judge, preference_report
from llama_jax.eval.preferences_shown import describe_preferences, plot_preferences
from llama_jax.item_log import ItemLog
from llama_jax.losses.dpo import PreferenceLoss, answer_log_probabilities
from llama_jax.losses.reward import pair_scores
from llama_jax.partitioning import Partitioner
from llama_jax.tokenizer.chat_format import ChatFormat
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params, PreferenceBatch

PREFIX = 'preference:'

logger = logging.getLogger('llama_jax.preference_files')


def task_of(file: str) -> str:
    """The name of the task that judges the pairs of a file."""
    return f'{PREFIX}{file}'


def split_tasks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files of pairs, the other tasks), each once."""
    files = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return list(dict.fromkeys(files)), [name for name in names if not name.startswith(PREFIX)]


@dataclasses.dataclass(frozen=True)
class PairFile:
    """The pairs of a file.

    Attributes:
      pairs: in order.
      seq_len: tokens that a prompt and one of its answers may have.
    """

    pairs: Sequence[EncodedPair]
    seq_len: int

    @functools.cached_property
    def left_out(self) -> list[int]:
        """Numbers of the pairs of which an answer behind its prompt is too long."""
        return [number for number, pair in enumerate(self.pairs) if _length(pair) > self.seq_len]

    def rows(self, pairs: Sequence[EncodedPair]) -> PreferenceRows:
        """Rows of each answer alone, two to a pair: so a pair has to fit into no row."""
        answers = [EncodedPair(pair.prompt, (answer, None)) for pair in pairs for answer in pair.answers]
        return PreferenceRows(answers, self.seq_len)


def _length(pair: EncodedPair) -> int:
    return len(pair.prompt) + max(len(answer.tokens) for answer in pair.answers if answer)


def read_pairs(
    files: Sequence[str],
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    on_error: str,
    seq_len: int,
    limit: int,
) -> dict[str, PairFile]:
    """The pairs of each file, the first ones where there is a limit; those that are too long are counted in a warning.

    Raises:
      InputError: a file cannot be read, a record is bad, or there is no pair of so many tokens.
    """
    found = {}
    for file in files:
        pairs = Reading(tokenizer, chat_format, seq_len, on_error=on_error).pairs([file])
        found[file] = of_file = PairFile(pairs[:limit] if limit else pairs, seq_len)
        number, longest = len(of_file.pairs), max(map(_length, of_file.pairs), default=0)
        if len(of_file.left_out) == number:
            raise InputError(
                f'{file}: of {number} pairs there is none of which both answers, behind the prompt, have at most '
                f'{seq_len} tokens: the longest has {longest}'
            )
        if of_file.left_out:
            logger.warning(
                '%s: left out %d of %d pairs, of which an answer behind its prompt has more than %d tokens, up to %d',
                file, len(of_file.left_out), number, seq_len, longest,
            )  # fmt: skip
    return found


def figures_of(
    model: Any, params: Params, partitioner: Partitioner, of_file: PairFile, batch_tokens: int
) -> dict[str, np.ndarray]:
    """What both answers of each pair are given, [pairs, 2], by name; NaN of an answer that is too long."""
    given = functools.partial(_answer_figures, model, params, partitioner, batch_tokens=batch_tokens)
    if model.config.scalar_head:
        return {'score': given(of_file.rows(of_file.pairs))}
    alone = [dataclasses.replace(pair, prompt=pair.prompt[:1]) for pair in of_file.pairs]
    summed, without = (given(of_file.rows(some)) for some in (of_file.pairs, alone))
    counts = np.array([[answer.counts.sum() for answer in pair.answers if answer] for pair in of_file.pairs])
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
        found = answer_figures(functools.partial(compiled, params), rows, target)
    return found[:, 0].reshape(-1, 2)


def report(of_file: PairFile, figures: dict[str, np.ndarray]) -> dict[str, Any]:
    """What results.json says of a file: how many pairs, and by each figure how well they are ordered."""
    pairs = of_file.pairs
    bag = folded_bag_of_words(pairs)
    found = {name: preference_report(judge(pairs, values)) | bag for name, values in figures.items()}
    shown = {f'accuracy_{name}': of_it['accuracy'] for name, of_it in found.items()}
    number = next(iter(found.values()))['pairs']
    return {'n': number, 'left_out': len(of_file.left_out), **shown, **found}


def check_samples(output: epath.Path, file: str, header: Mapping[str, Any]) -> None:
    """Raises InputError where what `write` would replace is of another checkpoint, or spelled otherwise."""
    ItemLog(_samples(output, file), {'task': task_of(file), **header}).close()


def write(
    output: epath.Path,
    file: str,
    header: Mapping[str, Any],
    of_file: PairFile,
    figures: dict[str, np.ndarray],
) -> None:
    """Plots, and each pair with its figures, below what they depend on beside the pairs."""
    samples = _samples(output, file)
    for figure, values in figures.items():
        plot_preferences(output / f'{samples.stem}_{figure}.png', judge(of_file.pairs, values), figure)
    first = json.dumps({'header': {'task': task_of(file), **header}}) + '\n'
    lines = [_line(i, pair, figures) for i, pair in enumerate(of_file.pairs)]
    samples.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(samples, first + ''.join(lines))


def _samples(output: epath.Path, file: str) -> epath.Path:
    return output / 'samples' / f'{task_of(file).replace("/", "_").replace(":", "_")}.jsonl'


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
        left_out = found['left_out'] and f'{found["left_out"]} more pairs are too long, and were left out'
        for name, of_it in found.items():
            if isinstance(of_it, dict):
                lines = ['', '```', *describe_preferences(of_it), '```', *([left_out] if left_out else [])]
                parts.append('\n'.join([f'## {task}, by {name}', *lines]))
    return '\n\n'.join(parts)
