"""Completing prompts: one prefill, then one token a step for all rows at once, in a compiled loop."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.inference.sampling import Sampler, SamplerRows, count_drawn, draw, seen_in_prompts
from llama_jax.models.kv_cache import CACHE_AXES, KVCache
from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.ops.linear import einsum
from llama_jax.partitioning import Partitioner, place_whole
from llama_jax.tokenizer.protocol import printable, prompt_ids, required
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import InputError, Params

# Steps between two looks at what the rows hold, where something but a stop token may end them.
_ROUND = 32
# Prompts from this width on are read by the kernels of training; narrower ones fit into one of their tiles.
_LONG_PROMPT = 128


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
      params: its weights.
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
    if '' in stop:
        raise InputError("a stop text is '', which every text begins with; give at least one character")
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

    def is_complete(index: int, tokens: list[int]) -> bool:
        text = completed_text(tokenizer, ids[index], tokens)
        return any(text_ in text for text_ in stop)

    ends = () if ignore_eos else tuple(sorted({*tokenizer.stop_ids, *stop_ids}))
    completions = generate_tokens(
        model, params, ids, max_new_tokens=max_new_tokens,
        sampler=sampler if samplers is None else samplers, stop_ids=ends, is_complete=is_complete if stop else None,
    )  # fmt: skip
    texts = [
        completed_text(tokenizer, prompt, completion)
        for prompt, completion in zip(ids, completions, strict=True)
    ]
    return [before_stop(text, stop) for text in texts]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def completed_text(tokenizer: Tokenizer, prompt: Sequence[int], completion: Sequence[int]) -> str:
    """What a completion adds to the text of its prompt."""
    # A token may decode differently after others (its leading space), so the prompt is decoded along and cut off.
    before = printable(tokenizer, prompt)
    return tokenizer.decode(before + printable(tokenizer, completion))[len(tokenizer.decode(before)) :]


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
    samplers = [sampler] * len(prompts) if isinstance(sampler, Sampler) else list(sampler)
    if len(samplers) != len(prompts):
        raise InputError(
            f'samplers are {len(samplers)} for {len(prompts)} prompts; there must be one for each'
        )
    context = model.config.max_seq_len
    if max_new_tokens < 1:
        raise InputError(f'max_new_tokens is {max_new_tokens}; it must be at least 1')
    if not prompts:
        return []
    if (least := max(sampler.min_new_tokens for sampler in samplers)) > max_new_tokens:
        raise InputError(f'min_new_tokens is {least}; it must be at most max_new_tokens, {max_new_tokens}')
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if lengths.min() < 1:
        raise InputError('a prompt has no token; begin it with the BOS token')
    if lengths.max() >= context:
        raise InputError(
            f'prompt {lengths.argmax()} has {lengths.max()} tokens; the model reads {context}, so shorten it to '
            f'at most {context - 1}'
        )
    if (largest := max(map(max, prompts))) >= model.config.vocab_size:
        raise InputError(
            f'a prompt holds token {largest}, for which the model has no row: it has {model.config.vocab_size}; give '
            'the tokenizer that the weights were trained with'
        )
    if model.partitioner is not None:
        model = model.clone(partitioner=_decode_rules(model.partitioner))
    # Shapes are rounded up to powers of two, so that few programs serve all prompts.
    width = min(_power_of_two(int(lengths.max())), context)
    steps = min(max_new_tokens, context - int(lengths.min()))
    num_steps = min(_power_of_two(steps), context)
    of_batch = model.partitioner.axis_size('batch') if model.partitioner else 1
    num_rows = -(-_power_of_two(len(prompts)) // of_batch) * of_batch
    tokens = np.zeros((num_rows, width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    # Rows of one sampler draw by their number, rows of their own by the seed alone.
    streams = range(num_rows) if isinstance(sampler, Sampler) else [0] * num_rows
    samplers += [Sampler()] * (num_rows - len(prompts))
    settings = SamplerRows.create(samplers, streams, [stop_ids] * num_rows, model.config.vocab_size)
    allowed = np.minimum(max_new_tokens, context - lengths)

    def place(rows):
        rows = np.pad(rows, ((0, num_rows - len(rows)),) + ((0, 0),) * (rows.ndim - 1))
        if model.partitioner is None:
            return rows
        axes = ('batch', None)[: rows.ndim]
        return place_whole(rows, model.partitioner.sharding(axes, rows.shape, 'prompts'))

    settings = jax.tree.map(place, settings)
    state = _prefill(
        model, params, place(tokens), place(np.maximum(lengths, 1)), settings, num_steps=num_steps
    )
    allowed, is_done = place(allowed), np.zeros(num_rows, bool)
    for end in range(_ROUND, num_steps + _ROUND, _ROUND) if is_complete else (num_steps,):
        state = _decode(
            model, params, state, settings, allowed, place(is_done), np.int32(min(end, num_steps))
        )
        new, count, running = jax.device_get((state.new, state.count, state.running))
        for index in range(len(prompts)):
            if is_complete and running[index] and is_complete(index, new[index, : count[index]].tolist()):
                is_done[index] = True
        if not (running & ~is_done).any():
            break
    return [row[:n].tolist() for row, n in zip(new, count, strict=True)][: len(prompts)]


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _decode_rules(partitioner: Partitioner) -> Partitioner:
    """Rows are whole on their devices: one new token does not divide."""
    rules = tuple((axis, () if axis == 'length' else mesh_axes) for axis, mesh_axes in partitioner.rules)
    return dataclasses.replace(partitioner, rules=rules)


@flax.struct.dataclass
class _Decoding:
    """Rows that are being completed.

    Attributes:
      cache: of all tokens read.
      token: the next one, drawn but not yet looked at.
      new: tokens so far.
      count: how many of them count.
      running: rows that may get more.
      seen: see `seen_in_prompts`; None where no row has penalties or the like.
      step: columns of `new` that are written.
    """

    cache: KVCache
    token: Int[Array, 'B']
    new: Int[Array, 'B S']
    count: Int[Array, 'B']
    running: Bool[Array, 'B']
    seen: Int[Array, 'B V'] | None
    step: Int[Array, '']


@functools.partial(jax.jit, static_argnames=('model', 'num_steps'))
def _prefill(
    model: LlamaForCausalLM,
    params: Params,
    tokens: Int[Array, 'B T'],
    lengths: Int[Array, 'B'],
    settings: SamplerRows,
    *,
    num_steps: int,
) -> _Decoding:
    """Right-padded prompts read, and the first token of each drawn."""
    batch = tokens.shape[0]
    cache = KVCache.create(model.config, batch, tokens.shape[1] + num_steps, model.dtype)
    cache = dataclasses.replace(cache, is_empty=tokens.shape[1] >= _LONG_PROMPT)
    if model.partitioner is not None:
        shard = functools.partial(model.partitioner.shard, axes=CACHE_AXES, name='cache')
        cache = dataclasses.replace(cache, keys=shard(cache.keys), values=shard(cache.values))
    hidden, read = model.apply({'params': params}, tokens, cache=cache, method='hidden')
    assert isinstance(read, KVCache)
    # The padding behind a short prompt was read too: count only the prompt, and the rest is overwritten.
    cache = read.advance(lengths)
    last = hidden[jnp.arange(batch), lengths - 1]
    logits = einsum('bd,vd->bv', last, head_weight(params), jnp.float32)
    seen = seen_in_prompts(tokens, lengths, logits.shape[-1]) if settings.adjustments else None
    first, seen = _draw(settings, logits, seen, 0)
    new, running = jnp.zeros((batch, num_steps), jnp.int32), jnp.ones(batch, bool)
    state = _Decoding(cache, first, new, jnp.zeros_like(first), running, seen, jnp.int32(0))
    return _readable(model, state)


def _draw(
    settings: SamplerRows, logits: Array, seen: Array | None, step: Array | int
) -> tuple[Array, Array | None]:
    """A token a row, and what is then seen."""
    token = draw(settings, logits, step, seen).token
    return token, None if seen is None else count_drawn(seen, token)


def decode_step(
    model: LlamaForCausalLM, params: Params, cache: KVCache, token: Int[Array, 'B']
) -> tuple[Float[Array, 'B V'], KVCache]:
    """One token more of every row is read: what may follow it, and the cache that holds it."""
    logits, read = model.apply({'params': params}, token[:, None], cache=cache)
    assert isinstance(read, KVCache)
    return logits[:, 0], read


@functools.partial(jax.jit, static_argnames='model', donate_argnames='state')
def _decode(
    model: LlamaForCausalLM,
    params: Params,
    state: _Decoding,
    settings: SamplerRows,
    allowed: Int[Array, 'B'],
    is_done: Bool[Array, 'B'],
    end: Int[Array, ''],
) -> _Decoding:
    """Goes on to step `end`, or until every row has its `allowed` tokens, a stop token, or is done as the host says."""

    def body(state):
        running = state.running & ~settings.is_stop(state.token) & (state.step < allowed)
        logits, cache = decode_step(model, params, state.cache, state.token)
        token, seen = _draw(settings, logits, state.seen, state.step + 1)
        new = state.new.at[:, state.step].set(state.token)
        return _Decoding(cache, token, new, state.count + running, running, seen, state.step + 1)

    def unfinished(state):
        return (state.step < end) & jnp.any(state.running)

    state = dataclasses.replace(state, running=state.running & ~is_done)
    return _readable(model, jax.lax.while_loop(unfinished, body, state))


def _readable(model: LlamaForCausalLM, state: _Decoding) -> _Decoding:
    """The rows' tokens on every process, the cache where it is."""
    if model.partitioner is None:
        return state
    everywhere = model.partitioner.sharding()
    read = {
        name: jax.lax.with_sharding_constraint(getattr(state, name), everywhere)
        for name in ('new', 'count', 'running')
    }
    return dataclasses.replace(state, **read)
