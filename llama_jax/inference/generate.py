"""Completing prompts: one prefill, then one token a step for all rows at once, compiled as a single loop."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.inference.sampling import Sampler
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.types import InputError, Params


def generate(
    model: LlamaForCausalLM,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Completions of the prompts, without the prompts themselves.

    Args:
      model: the architecture and its compute dtype.
      params: its weights.
      tokenizer: that the weights were trained with.
      prompts: any number of texts; '' starts a document.
      max_new_tokens: at most this many each; a row ends earlier at its end-of-text token or at the model's context.
      temperature: 0 is greedy.
      top_k: see `Sampler`.
      top_p: see `Sampler`.
      seed: of the draws.

    Raises:
      InputError: a prompt leaves no room in the model's context, or a sampling setting is out of range.
    """
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    completions = generate_tokens(
        model, params, ids, max_new_tokens=max_new_tokens, sampler=Sampler(temperature, top_k, top_p),
        stop_ids=(tokenizer.eos_id,), seed=seed,
    )  # fmt: skip
    # A token may decode differently after others (its leading space), so the prompt is decoded along and cut off.
    return [
        tokenizer.decode(prompt + completion)[len(tokenizer.decode(prompt)) :]
        for prompt, completion in zip(ids, completions, strict=True)
    ]


def generate_tokens(
    model: LlamaForCausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: tuple[int, ...],
    seed: int = 0,
) -> list[list[int]]:
    """As `generate`, on token ids; a stop token ends its row and is left out."""
    context = model.config.max_seq_len
    if max_new_tokens < 1:
        raise InputError(f'max_new_tokens is {max_new_tokens}; it must be at least 1')
    if not prompts:
        return []
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if lengths.min() < 1:
        raise InputError('a prompt has no token; begin it with the BOS token')
    if lengths.max() >= context:
        raise InputError(
            f'prompt {lengths.argmax()} has {lengths.max()} tokens; the model reads {context}, so shorten it to '
            f'at most {context - 1}'
        )
    # Shapes are rounded up to powers of two, so that few programs serve all prompts.
    width = min(_power_of_two(int(lengths.max())), context)
    steps = min(max_new_tokens, context - int(lengths.min()))
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    new, count = _generate(
        model, params, tokens, lengths, np.minimum(max_new_tokens, context - lengths), jax.random.key(seed),
        num_steps=min(_power_of_two(steps), context), sampler=sampler, stop_ids=stop_ids,
    )  # fmt: skip
    new, count = jax.device_get((new, count))
    return [row[:n].tolist() for row, n in zip(new, count, strict=True)]


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@functools.partial(jax.jit, static_argnames=('model', 'num_steps', 'sampler', 'stop_ids'))
def _generate(
    model: LlamaForCausalLM,
    params: Params,
    tokens: Int[Array, 'B T'],
    lengths: Int[Array, 'B'],
    allowed: Int[Array, 'B'],
    rng: Array,
    *,
    num_steps: int,
    sampler: Sampler,
    stop_ids: tuple[int, ...],
) -> tuple[Int[Array, 'B S'], Int[Array, 'B']]:
    """New tokens of right-padded prompts, and how many of each row count (at most `allowed`, before a stop token)."""
    batch = tokens.shape[0]
    rows = jnp.arange(batch)
    cache = KVCache.create(model.config, batch, tokens.shape[1] + num_steps, model.dtype)
    logits, cache = model.apply({'params': params}, tokens, cache=cache)
    assert isinstance(cache, KVCache)
    # The padding behind a short prompt was read too: count only the prompt, and the rest is overwritten.
    cache = dataclasses.replace(cache, length=lengths)
    first = sampler(logits[rows, lengths - 1], jax.random.fold_in(rng, 0))
    is_stop = lambda token: jnp.isin(token, jnp.array(stop_ids))  # noqa: E731

    def body(loop):
        step, token, cache, new, count, running = loop
        new = new.at[:, step].set(token)
        running = running & ~is_stop(token) & (step < allowed)
        count = count + running
        logits, cache = model.apply({'params': params}, token[:, None], cache=cache)
        token = sampler(logits[:, 0], jax.random.fold_in(rng, step + 1))
        return step + 1, token, cache, new, count, running

    def unfinished(loop):
        step, *_, running = loop
        return (step < num_steps) & jnp.any(running)

    start = (
        0, first, cache, jnp.zeros((batch, num_steps), jnp.int32), jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool),
    )  # fmt: skip
    _, _, _, new, count, _ = jax.lax.while_loop(unfinished, body, start)
    return new, count
