"""Figures of a model: its tokens, what comes next, where it looks, what each layer would say, how it counts places."""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llama_jax.figures.chart import Chart, Page, heat_map, plain
from llama_jax.models.config import LlamaConfig
from llama_jax.models.inspect import inspect
from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.ops.linear import einsum
from llama_jax.ops.normalization import rms_norm
from llama_jax.ops.rope import inverse_frequencies
from llama_jax.tokenizer.protocol import Tokenizer, prompt_ids
from llama_jax.types import Params

_PAPER = ('#fde2e4', '#e2ece9', '#dfe7fd', '#fff1e6', '#eae4e9')


def tokens_in_colours(
    tokenizer: Tokenizer, text: str, values: Float[np.ndarray, ' T'] | None = None, unit: str = 'nats'
) -> Page:
    """The text cut into its tokens, each on paper of its own; with values, the redder the larger.

    Args:
      tokenizer: that cuts it.
      text: any.
      values: of each token; one less than there are says nothing of the first, which has no colour.
      unit: of the values, which are told where the mouse rests.
    """
    ids = prompt_ids(tokenizer, text)
    names = _names_of(tokenizer, ids)
    if values is None:
        notes, colours = [f'id {token}' for token in ids], [_PAPER[i % len(_PAPER)] for i in range(len(ids))]
    else:
        told = [math.nan] * (len(ids) - len(values)) + [float(value) for value in values]
        top = max([value for value in told if math.isfinite(value)], default=1.0) or 1.0
        notes = ['' if math.isnan(value) else f'{value:.2f} {unit}' for value in told]
        shares = [0.0 if math.isnan(value) else min(max(value / top, 0.0), 1.0) for value in told]
        colours = [f'rgba(220, 60, 40, {0.75 * share:.2f})' for share in shares]
    spans = (
        f'<span title="{html.escape(note)}" style="background:{colour};padding:2px 1px;white-space:pre">'
        f'{html.escape(name)}</span>'
        for name, note, colour in zip(names, notes, colours, strict=True)
    )
    return Page(f'<div style="font-family:monospace">{"".join(spans)}</div>', '|'.join(names))


def next_tokens(
    model: LlamaForCausalLM, params: Params, tokenizer: Tokenizer, prompt: str, count: int = 10
) -> Chart:
    """What the model takes for likely to follow a text: a bar for each of the likeliest tokens."""
    tokens = jnp.array([prompt_ids(tokenizer, prompt)], jnp.int32)
    logits, _ = model.apply({'params': params}, tokens)
    probabilities = np.asarray(jax.nn.softmax(logits[0, -1]))
    likely = np.argsort(-probabilities, kind='stable')[:count]
    chart = Chart(figsize=(7, 0.35 * len(likely) + 1), layout='constrained')
    axes = chart.subplots()
    axes.barh(_labels(tokenizer, likely.tolist()), probabilities[likely])
    axes.invert_yaxis()
    axes.set(xlabel='probability', ylabel='next token', title=f'after {plain(prompt[-50:])}')
    return chart


def attention_maps(
    probabilities: Float[Array, 'N T S'], tokenizer: Tokenizer, text: str, title: str = 'attention by head'
) -> Chart:
    """How much each head looks at each token: queries downwards, keys to the right.

    Args:
      probabilities: of one layer and row, as `models.inspect.inspect` gives them.
      tokenizer: that cut the text.
      text: whose tokens are named.
      title: above.
    """
    columns = min(4, len(probabilities))
    rows = -(-len(probabilities) // columns)
    labels = _labels(tokenizer, prompt_ids(tokenizer, text))
    chart = Chart(figsize=(2.6 * columns, 2.6 * rows + 0.4), layout='constrained')
    for head, axes in enumerate(chart.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if head >= len(probabilities):
            continue
        axes.set_axis_on()
        drawn = axes.imshow(np.asarray(probabilities[head]), vmin=0, vmax=1, cmap='viridis')
        axes.set_title(f'head {head}', fontsize=9)
        places = range(len(labels)) if len(labels) <= 16 else ()
        axes.set_xticks(places, labels if places else (), rotation=90, fontsize=6)
        axes.set_yticks(places, labels if places else (), fontsize=6)
    chart.colorbar(drawn, ax=chart.axes, label='probability', shrink=0.6)
    chart.suptitle(title)
    return chart


def logit_lens(model: LlamaForCausalLM, params: Params, tokenizer: Tokenizer, text: str) -> Chart:
    """The token that every layer would say comes next, were it the last, and how probable it is to it."""
    ids = prompt_ids(tokenizer, text)
    hidden = inspect(model, params, jnp.array([ids], jnp.int32), what='hidden')['hidden'][:, 0]
    normed = rms_norm(hidden, params['final_norm'], model.config.norm_eps)
    probabilities = np.asarray(
        jax.nn.softmax(einsum('btd,vd->btv', normed, head_weight(params), jnp.float32))
    )
    best, tops = probabilities.argmax(-1), probabilities.max(-1)
    title = f'what each layer would say next: {plain(text[-40:])}'
    unit = 'probability of its best token'
    chart = heat_map(tops, title, unit, 'after the token', 'layer', _labels(tokenizer, ids))
    for layer, place in np.ndindex(*best.shape):
        colour = 'black' if tops[layer, place] > 0.6 else 'white'
        name = _labels(tokenizer, [int(best[layer, place])])[0][:8]
        chart.axes[0].text(place, layer, name, ha='center', va='center', fontsize=6, color=colour)
    return chart


def rope_wavelengths(configs: Mapping[str, LlamaConfig]) -> Chart:
    """Tokens that each rotated pair takes for one turn, by release; beyond a context no pair has gone round."""
    chart = Chart(figsize=(7, 4.5), layout='constrained')
    axes = chart.subplots()
    for name, config in configs.items():
        scaling = {} if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling)
        scaling.pop('attention_factor', None)
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, **scaling)
        pairs = np.arange(len(frequencies)) / len(frequencies)
        [line] = axes.plot(pairs, 2 * np.pi / frequencies, label=name)
        axes.axhline(config.max_seq_len, color=line.get_color(), linestyle=':', linewidth=0.8)
    axes.set(
        yscale='log', xlabel='rotated pair (share of the head)', ylabel='wavelength (tokens)',
        title='RoPE by release; dotted: the context',
    )  # fmt: skip
    axes.legend()
    return chart


def _names_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text."""
    texts = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    return [
        after[len(before) :] if after.startswith(before) else tokenizer.decode([token])
        for token, before, after in zip(ids, texts, texts[1:], strict=False)
    ]


def _labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Distinct short names of tokens for an axis."""
    return [plain(tokenizer.decode([token])) or f'<{token}>' for token in ids]
