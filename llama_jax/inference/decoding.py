"""The programs of generation: prompts read piece by piece, then a token a step for all rows at once.

There is one program to read with for each (rows, width of a piece, room of the cache), and one to decode with for each
(rows, room): what is asked of the rows is in arrays. The room is a power of two that covers the longest row alive, so a
step reads no more than twice what is there; when a row outgrows it, the cache is copied into twice the room once, and
the next program goes on.
"""

import dataclasses
import functools
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from llama_jax.inference.sampling import SamplerRows, count_drawn, draw, seen_in_prompts
from llama_jax.models.kv_cache import CACHE_AXES, KVCache
from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.ops.attention import platform_of
from llama_jax.ops.linear import einsum
from llama_jax.partitioning import Partitioner, place_whole
from llama_jax.types import Params

# Columns of new tokens that are read from the devices at once.
COLUMNS = 256
# Tokens of a prompt that are read at once: enough to keep a device busy, and little memory.
_PIECE = {'cpu': 512}
_ACCELERATORS_PIECE = 2048
# The least room of a cache that grows: below it a program for every power of two would cost more than it saves.
_LEAST_ROOM = 256
# Pieces from this width on that begin a row are read by the kernels of training; narrower ones fit into one tile.
_LONG_PIECE = 128


@flax.struct.dataclass
class Decoding:
    """Rows that are being completed.

    Attributes:
      cache: of all tokens read.
      token: the next one, drawn but not yet looked at.
      new: tokens of the last `decode`.
      count: how many tokens of each row count, from the first on.
      running: rows that may get more.
      seen: see `sampling.seen_in_prompts`; None where no row has penalties or the like.
      step: tokens that each row has been given.
    """

    cache: KVCache
    token: Int[Array, 'B']
    new: Int[Array, 'B columns']
    count: Int[Array, 'B']
    running: Bool[Array, 'B']
    seen: Int[Array, 'B V'] | None
    step: Int[Array, '']


def power_of_two(size: int) -> int:
    """The next from `size` on."""
    return 1 << (size - 1).bit_length()


def with_whole_rows(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with the rules of decoding: rows are whole on their devices, as one new token does not divide."""
    if (partitioner := model.partitioner) is None:
        return model
    rules = tuple((axis, () if axis == 'length' else mesh_axes) for axis, mesh_axes in partitioner.rules)
    return model.clone(partitioner=dataclasses.replace(partitioner, rules=rules))


def place(rows: np.ndarray, partitioner: Partitioner | None) -> np.ndarray | Array:
    """Values by row, where the rows are."""
    if partitioner is None:
        return rows
    axes = ('batch', None)[: rows.ndim]
    return place_whole(rows, partitioner.sharding(axes, rows.shape, 'prompts'))


def rows_of(num_prompts: int, partitioner: Partitioner | None) -> int:
    """Rows of a batch for so many prompts: few numbers, so that few programs serve all."""
    of_batch = partitioner.axis_size('batch') if partitioner else 1
    return -(-power_of_two(num_prompts) // of_batch) * of_batch


def start(
    model: LlamaForCausalLM,
    params: Params,
    tokens: Int[np.ndarray, 'B T'],
    lengths: Int[np.ndarray, 'B'],
    settings: SamplerRows,
    longest: int,
) -> Decoding:
    """Prompts read, and the first token of each drawn.

    Args:
      model: with whole rows.
      params: its weights, of layers apart.
      tokens: prompts, padded on the right.
      lengths: of the prompts, each at least 1.
      settings: of the rows, placed.
      longest: tokens that a row may come to have, so that short completions get their room at once.
    """
    batch, num_tokens = tokens.shape
    width = min(power_of_two(num_tokens), _PIECE.get(platform_of(model.partitioner), _ACCELERATORS_PIECE))
    padded = -(-num_tokens // width) * width
    room = power_of_two(max(padded, num_tokens + 1, min(longest, _LEAST_ROOM)))
    cache = _empty_cache(model, batch, room, width >= _LONG_PIECE)
    last = place(np.zeros((batch, model.config.embed_dim), jnp.dtype(model.dtype)), model.partitioner)
    seen = None
    for piece, counts in _pieces(tokens, lengths, width):
        piece, counts = place(piece, model.partitioner), place(counts, model.partitioner)
        cache, last = read(model, params, cache, last, piece, counts)
        if settings.adjustments:
            seen = _seen(seen, piece, counts, model.config.vocab_size)
    return _first(model, params, cache, last, settings, seen)


def _pieces(
    tokens: Int[np.ndarray, 'B T'], lengths: Int[np.ndarray, 'B'], width: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of one width, and how many tokens of each row are in it."""
    for begin in range(0, tokens.shape[1], width):
        piece = tokens[:, begin : begin + width]
        piece = np.pad(piece, ((0, 0), (0, width - piece.shape[1])))
        yield piece, np.clip(lengths - begin, 0, width).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_cache(model: LlamaForCausalLM, batch_size: int, room: int, is_empty: bool) -> KVCache:
    # A CPU multiplies in float32, and would convert all of another type for every product with it.
    dtype = jnp.float32 if platform_of(model.partitioner) == 'cpu' else model.dtype
    cache = dataclasses.replace(KVCache.create(model.config, batch_size, room, dtype), is_empty=is_empty)
    if model.partitioner is None:
        return cache
    shard = functools.partial(model.partitioner.shard, axes=CACHE_AXES, name='cache')
    return dataclasses.replace(
        cache, keys=tuple(map(shard, cache.keys)), values=tuple(map(shard, cache.values))
    )


@functools.partial(jax.jit, static_argnames='model', donate_argnames=('cache', 'last'))
def read(
    model: LlamaForCausalLM,
    params: Params,
    cache: KVCache,
    last: Float[Array, 'B D'],
    tokens: Int[Array, 'B T'],
    counts: Int[Array, 'B'],
) -> tuple[KVCache, Float[Array, 'B D']]:
    """A piece of every row, padded on the right to one width: the cache with it, and each row's last hidden state.

    Args:
      model: with whole rows.
      params: its weights.
      cache: with room for the padding too.
      last: hidden states of rows that have nothing in this piece.
      tokens: the piece.
      counts: tokens of each row in it.
    """
    hidden, written = model.apply({'params': params}, tokens, cache=cache, method='hidden')
    assert isinstance(written, KVCache)
    found = hidden[jnp.arange(len(counts)), jnp.maximum(counts - 1, 0)]
    # The padding behind a short row was read too: count only what is the row's, and the rest is overwritten.
    return written.advance(counts), jnp.where((counts > 0)[:, None], found, last)


@functools.partial(jax.jit, static_argnums=3)
def _seen(seen: Array | None, tokens: Array, counts: Array, vocab_size: int) -> Array:
    found = seen_in_prompts(tokens, counts, vocab_size)
    return found if seen is None else jnp.maximum(seen, found)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def _first(
    model: LlamaForCausalLM,
    params: Params,
    cache: KVCache,
    last: Float[Array, 'B D'],
    settings: SamplerRows,
    seen: Int[Array, 'B V'] | None,
) -> Decoding:
    """Prompts were read: their rows with the first token of each."""
    logits = einsum('bd,vd->bv', last, head_weight(params), jnp.float32)
    token, seen = _draw(settings, logits, seen, 0)
    new, running = jnp.zeros((len(last), COLUMNS), jnp.int32), jnp.ones(len(last), bool)
    return _readable(model, Decoding(cache, token, new, jnp.zeros_like(token), running, seen, jnp.int32(0)))


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
    logits, written = model.apply({'params': params}, token[:, None], cache=cache)
    assert isinstance(written, KVCache)
    return logits[:, 0], written


@functools.partial(jax.jit, static_argnames='model', donate_argnames='state')
def decode(
    model: LlamaForCausalLM,
    params: Params,
    state: Decoding,
    settings: SamplerRows,
    allowed: Int[Array, 'B'],
    is_done: Bool[Array, 'B'],
    end: Int[Array, ''],
) -> Decoding:
    """Goes on to step `end`, or until every row has its `allowed` tokens, a stop token, or is done as the host says.

    Up to there each running row must have room in the cache, and the step at most `COLUMNS` to go.
    """
    first = state.step

    def body(state):
        running = state.running & ~settings.is_stop(state.token) & (state.step < allowed)
        logits, cache = decode_step(model, params, state.cache, state.token)
        token, seen = _draw(settings, logits, state.seen, state.step + 1)
        new = state.new.at[:, state.step - first].set(state.token)
        return Decoding(cache, token, new, state.count + running, running, seen, state.step + 1)

    def unfinished(state):
        return (state.step < end) & jnp.any(state.running)

    state = dataclasses.replace(state, running=state.running & ~is_done)
    return _readable(model, jax.lax.while_loop(unfinished, body, state))


def _readable(model: LlamaForCausalLM, state: Decoding) -> Decoding:
    """The rows' tokens on every process, the cache where it is."""
    if model.partitioner is None:
        return state
    everywhere = model.partitioner.sharding()
    read = {
        name: jax.lax.with_sharding_constraint(getattr(state, name), everywhere)
        for name in ('new', 'count', 'running')
    }
    return dataclasses.replace(state, **read)


def with_room(state: Decoding, room: int) -> Decoding:
    """The rows in a cache of more room; one layer after the other, so that the old one is soon gone."""
    keys, values = list(state.cache.keys), list(state.cache.values)
    cache = dataclasses.replace(state.cache, keys=(), values=())
    state = dataclasses.replace(state, cache=cache)
    for layers in (keys, values):
        for layer, array in enumerate(layers):
            sharding = array.sharding if isinstance(array.sharding, NamedSharding) else None
            layers[layer] = _padding(room, sharding)(array)
            array.delete()
    cache = dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))
    return dataclasses.replace(state, cache=cache)


@functools.lru_cache(maxsize=64)
def _padding(room: int, sharding: NamedSharding | None):
    def pad(array):
        return jnp.pad(array, ((0, 0), (0, 0), (0, room - array.shape[2]), (0, 0)))

    return jax.jit(pad, out_shardings=sharding)
