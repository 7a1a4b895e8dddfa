"""Completing prompts: texts and their tokens around the compiled programs of `inference.decoding`."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from llama_jax.inference import decoding
from llama_jax.inference.decode_weights import decode_weights
from llama_jax.inference.detokenizer import Detokenizer, RowTexts
from llama_jax.inference.sampling import Sampler, SamplerRows, seen_in_prompts
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.tokenizer.protocol import prompt_ids, required
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import InputError, Params

# Steps between two looks at what the rows hold, where something but a stop token may end them.
_ROUND = 32
# The same where text is shown as it is made; the first rounds are shorter.
_STREAMED_ROUND = 8


def generate(
    model: LlamaForCausalLM,
    params: Params,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float | int] | None = None,
    min_new_tokens: int = 0,
    seed: int = 0,
    samplers: Sequence[Sampler] | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    special_tokens: bool = False,
) -> list[str]:
    """Completions of the prompts, without the prompts themselves.

    Args:
      model: the architecture and its compute dtype; its partitioner, where it has one, places the rows.
      params: its weights, as `load` gives them: for as long as they live, a copy that decodes at the memory's speed is
        kept beside them. To have one copy alone, give `unstack(params, model.dtype, delete=True)`.
      tokenizer: that the weights were trained with.
      prompts: any number of texts, or of token ids; '' starts a document.
      max_new_tokens: at most this many each; a row ends earlier at a stop id of the tokenizer, or at the context.
      temperature: 0 is greedy.
      top_k: see `Sampler`, also for those up to `logit_bias`.
      top_p: keeps the most likely tokens.
      min_p: keeps likely tokens.
      repetition_penalty: of tokens of prompt and completion.
      presence_penalty: of tokens of the completion.
      frequency_penalty: of tokens of the completion, each time.
      logit_bias: {token id: what is added to its logit}.
      min_new_tokens: no token that ends a completion comes before so many; a text of `stop` may.
      seed: of the draws; rows are drawn apart by their number.
      samplers: all of these settings for each prompt, instead; each row is then drawn by its own seed alone.
      stop: texts that end a completion where they begin; they are left out.
      stop_ids: of tokens that end a completion, besides those of the tokenizer.
      ignore_eos: go on behind what ends a text.
      special_tokens: names of special tokens in a prompt are those tokens, else plain text.

    Raises:
      InputError: a prompt leaves no room in the model's context, or a setting is out of range.
    """
    tokenizer = required(tokenizer)
    sampler = Sampler(
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias or {},
        min_new_tokens, seed,
    )  # fmt: skip
    if samplers is not None and sampler != Sampler():
        raise InputError('samplers hold the settings of each prompt; give none beside them')
    ids = [
        prompt_ids(tokenizer, prompt, special_tokens) if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]

    texts = RowTexts(tokenizer, ids, stop)
    ends = () if ignore_eos else tuple(sorted({*tokenizer.stop_ids, *stop_ids}))
    completions = generate_tokens(
        model, params, ids, max_new_tokens=max_new_tokens, sampler=sampler if samplers is None else samplers,
        stop_ids=ends, is_complete=texts.is_complete if stop else None,
    )  # fmt: skip
    return texts.finish(completions)


def stream(
    model: LlamaForCausalLM,
    params: Params,
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    special_tokens: bool = False,
    **settings: Any,
) -> Iterator[str]:
    """The completion of one prompt while it is made: pieces that join to what `generate` returns for it.

    Args:
      model: see `generate`, also for those up to `special_tokens`.
      params: its weights.
      tokenizer: that the weights were trained with.
      prompt: a text, or token ids.
      max_new_tokens: at most this many.
      stop: texts that end it; no piece shows the beginning of one.
      stop_ids: of tokens that end it.
      ignore_eos: go on behind what ends a text.
      special_tokens: whether names of special tokens are those tokens.
      settings: of a `Sampler`.

    Raises:
      InputError: see `generate`; before the first piece.
    """
    tokenizer = required(tokenizer)
    ids = prompt_ids(tokenizer, prompt, special_tokens) if isinstance(prompt, str) else list(prompt)
    row, made = Detokenizer(tokenizer, ids, stop), []

    def read(index: int, tokens: list[int]) -> bool:
        made.append(row.push(tokens[row.num_ids :]))
        return row.is_stopped

    ends = () if ignore_eos else tuple(sorted({*tokenizer.stop_ids, *stop_ids}))
    rounds = _rounds(
        model, params, [ids], max_new_tokens=max_new_tokens, sampler=Sampler(**settings), stop_ids=ends,
        is_complete=read, is_streamed=True,
    )  # fmt: skip

    def pieces() -> Iterator[str]:
        for (tokens,) in rounds:
            read(0, tokens)
            if piece := ''.join(made):
                yield piece
            made.clear()
        if piece := row.flush():
            yield piece

    return pieces()


def generate_tokens(
    model: LlamaForCausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler | Sequence[Sampler],
    stop_ids: Sequence[int],
    is_complete: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """As `generate`, on token ids; a stop token ends its row and is left out.

    Every process of a job makes the same call and gets all rows.

    Args:
      model: see `generate`.
      params: its weights.
      prompts: token ids, each at least one.
      max_new_tokens: at most this many each.
      sampler: chooses the tokens. Rows of one are drawn by its seed and their number, rows of their own by their seeds
        alone, whatever they are generated with.
      stop_ids: tokens that end a row.
      is_complete: (index of the prompt, its new tokens so far) -> whether they are enough, asked every few steps; the
        row is then returned as it is.

    Raises:
      InputError: a prompt is empty or leaves no room in the model's context, or a setting does not fit.
    """
    rounds = _rounds(
        model, params, prompts, max_new_tokens=max_new_tokens, sampler=sampler, stop_ids=stop_ids,
        is_complete=is_complete,
    )  # fmt: skip
    last = collections.deque(rounds, maxlen=1)
    return [row for rows in last for row in rows]


def _rounds(
    model: LlamaForCausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler | Sequence[Sampler],
    stop_ids: Sequence[int],
    is_complete: Callable[[int, list[int]], bool] | None,
    is_streamed: bool = False,
) -> Iterator[list[list[int]]]:
    """As `generate_tokens`: the new tokens of the rows so far, after every round.

    The prompts are read, and refused, by the call.
    """
    samplers = [sampler] * len(prompts) if isinstance(sampler, Sampler) else list(sampler)
    if len(samplers) != len(prompts):
        raise InputError(
            f'samplers are {len(samplers)} for {len(prompts)} prompts; there must be one for each'
        )
    context = model.config.max_seq_len
    if max_new_tokens < 1:
        raise InputError(f'max_new_tokens is {max_new_tokens}; it must be at least 1')
    if not prompts:
        return iter(())
    if (least := max(sampler.min_new_tokens for sampler in samplers)) > max_new_tokens:
        raise InputError(f'min_new_tokens is {least}; it must be at most max_new_tokens, {max_new_tokens}')
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) < 1:
        raise InputError('a prompt has no token; begin it with the BOS token')
    if max(lengths) >= context:
        raise InputError(
            f'prompt {np.argmax(lengths)} has {max(lengths)} tokens; the model reads {context}, so shorten it to '
            f'at most {context - 1}'
        )
    if (largest := max(map(max, prompts))) >= model.config.vocab_size:
        raise InputError(
            f'a prompt holds token {largest}, for which the model has no row: it has {model.config.vocab_size}; give '
            'the tokenizer that the weights were trained with'
        )
    model = decoding.with_whole_rows(model)
    weights = decode_weights(params, model.dtype)
    num_rows = decoding.rows_of(len(prompts), model.partitioner)
    # Rows of one sampler draw by their number, rows of their own by the seed alone.
    streams = range(num_rows) if isinstance(sampler, Sampler) else [0] * num_rows
    filling = num_rows - len(prompts)  # rows that only fill up the batch: they read one token and get one
    settings = SamplerRows.create(
        samplers + [Sampler()] * filling, streams, [stop_ids] * num_rows, model.config.vocab_size
    )
    prompts = [*prompts, *[[0]] * filling]
    allowed = np.minimum(max_new_tokens, context - np.array([len(prompt) for prompt in prompts], np.int32))
    allowed[num_rows - filling :] = 1
    rows, steps = _begin(model, weights, prompts, settings, allowed)
    return _complete(
        model, weights, rows, steps, prompts, stop_ids, allowed, filling, is_complete, is_streamed
    )


def _begin(
    model: LlamaForCausalLM,
    weights: Params,
    prompts: Sequence[Sequence[int]],
    settings: SamplerRows,
    allowed: Int[np.ndarray, 'B'],
) -> tuple[decoding.Rows, decoding.Steps]:
    """Prompts read, and the first token of each."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    width = min(decoding.power_of_two(longest), decoding.piece_width(model.partitioner))
    tokens = np.zeros((len(prompts), -(-longest // width) * width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    in_the_end = int((lengths + allowed).max())  # short completions get their room at once
    room = decoding.power_of_two(max(tokens.shape[1], longest + 1, min(in_the_end, decoding.LEAST_ROOM)))
    rows = decoding.empty_rows(model, len(prompts), room, settings)
    place = functools.partial(decoding.place, partitioner=model.partitioner)
    last = None
    for start in range(0, tokens.shape[1], width):
        counts = np.clip(lengths - start, 0, width)
        piece = tokens[:, start : start + width], counts, np.minimum(lengths, start).astype(np.int32)
        piece, counts, starts = map(place, piece)
        cache, hidden = decoding.extend(model, weights, rows.cache, None, starts, piece, counts, start == 0)
        rows = dataclasses.replace(rows, cache=cache)
        last = hidden if last is None else jnp.where((counts > 0)[:, None], hidden, last)
    seen = seen_in_prompts(prompts, model.config.vocab_size) if settings.adjustments else None
    begun = decoding.Begun(np.arange(len(prompts), dtype=np.int32), allowed, seen, settings)
    return decoding.first(model, weights, rows, last, jax.tree.map(place, begun))


def _complete(
    model: LlamaForCausalLM,
    weights: Params,
    rows: decoding.Rows,
    steps: decoding.Steps,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    allowed: Int[np.ndarray, 'B'],
    filling: int,
    is_complete: Callable[[int, list[int]], bool] | None,
    is_streamed: bool,
) -> Iterator[list[list[int]]]:
    """The new tokens of rows that have begun, after every round."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    made: list[list[int]] = [[] for _ in prompts]
    is_done, given = np.zeros(len(made), bool), 1
    at_once = 1 if is_streamed else min(_ROUND, decoding.COLUMNS) if is_complete else decoding.COLUMNS
    while True:
        new, count, running = jax.device_get((steps.tokens, steps.count, steps.running))
        for index, number in enumerate(count):
            made[index] += new[index, :number].tolist()
            if number and made[index][-1] in stop_ids:
                made[index].pop()
            if is_complete and running[index]:
                is_done[index] = is_complete(index, made[index])
        yield made[: len(made) - filling]
        running = running & ~is_done
        if not running.any():
            return
        # A step reads the last token, so that the cache then holds the prompt and all that was given before it.
        held = int(lengths[running].max()) + given - 1
        if held == (room := rows.cache.max_len):
            rows = decoding.with_room(rows, room := 2 * room)
        num_steps = min(at_once, room - held, int(allowed[running].max()) - given)
        done = decoding.place(is_done, model.partitioner)
        rows, steps = decoding.decode(model, weights, rows, done, np.int32(num_steps))
        given += num_steps
        if is_streamed:
            at_once = min(2 * at_once, _STREAMED_ROUND)
