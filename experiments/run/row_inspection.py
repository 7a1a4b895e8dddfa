"""Packed rows as people read them: what stands in them, and what of it is learnt."""

import io
from typing import Any

import numpy as np
from etils import epath

from llama_jax import storage
from llama_jax.data.examples import ExampleRows
from llama_jax.tokenizer.tokenizer import Tokenizer


def describe_rows(rows: ExampleRows, tokenizer: Tokenizer, count: int) -> str:
    """The first rows decoded, what is learnt between »«, and what the rows hold in all."""
    lines = []
    for index in range(min(count, len(rows))):
        row = rows[index]
        used = row['segment_ids'] > 0
        lines.append(f'row {index}: {row["segment_ids"].max()} examples, {used.sum()} of {len(used)} tokens')
        for segment in range(1, row['segment_ids'].max() + 1):
            own = row['segment_ids'] == segment
            lines.append(f'  {segment}: {marked(row["tokens"][own], row["counts"][own], tokenizer)}')
    lengths = np.array([len(example.tokens) for example in rows.examples])
    lines.append(
        f'{rows.num_documents} examples of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.1f} on average, '
        f'{np.median(lengths):.0f} in the middle; {rows.num_counted} of {rows.num_tokens} are learnt'
    )
    lines.append(f'{len(rows)} rows of {rows.seq_len + 1} tokens, {100 * rows.fill:.1f} % full')
    return '\n'.join(lines)


def marked(tokens: Any, counts: Any, tokenizer: Tokenizer) -> str:
    """The text, with what counts between »«; ends are spelled, for they are what a model must learn to say."""
    text, begin = '', 0
    cuts = [*(np.flatnonzero(counts[1:] != counts[:-1]) + 1), len(tokens)]
    for end in cuts:
        piece = tokens[begin:end].tolist()
        if counts[begin] and piece[-1] in tokenizer.stop_ids:
            text += f'»{tokenizer.decode(piece[:-1])}<stop>«'
        else:
            text += f'»{tokenizer.decode(piece)}«' if counts[begin] else tokenizer.decode(piece)
        begin = end
    return text


def plot_lengths(rows: ExampleRows, file: epath.Path) -> epath.Path:
    """Writes a histogram of the examples' tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    axes.hist([len(example.tokens) for example in rows.examples], bins=50)
    axes.set(xlabel='tokens in an example', ylabel='examples')
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=120)
    storage.write_atomically(file, image.getvalue())
    return file
