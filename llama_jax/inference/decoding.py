"""The programs of generation, over rows that are independent: one may begin while others go on.

`read` reads a piece of some prompts into the cache, `first` draws their first tokens and puts them among the rows,
`decode` then gives every running row a token a step. There is one program of each for its shapes (rows, width of a
piece, room of the cache, but not for a first piece): what is asked of the rows is in arrays. The room is a power of two
that covers the longest row alive, so a step reads no more than twice what is there; when a row outgrows it, the cache
is copied into twice the room once, and the next program goes on.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from llama_jax.inference.sampling import SamplerRows, count_drawn, draw
from llama_jax.inference.steps import Steps
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.ops.linear import einsum
from llama_jax.partitioning import Partitioner, place_whole
from llama_jax.types import Params

# Steps of one `decode` at most.
COLUMNS = 64
# The least room of a cache that grows: below it a program for every power of two would cost more than it saves.
LEAST_ROOM = 256
# Pieces from this width on that begin a row are read by the kernels of training; narrower ones fit into one tile.
LONG_PIECE = 128


@flax.struct.dataclass
class Rows:
    """Rows that are being completed; B are the slots of the batch, which may be free.

    Attributes:
      cache: of all tokens read.
      token: the last that each row was given, not yet read.
      step: how many it was given.
      allowed: how many it may get.
      running: rows that get more.
      seen: see `sampling.seen_in_prompts`; None where no row has penalties or the like.
      settings: how each row's tokens are chosen.
    """

    cache: KVCache
    token: Int[Array, 'B']
    step: Int[Array, 'B']
    allowed: Int[Array, 'B']
    running: Bool[Array, 'B']
    seen: Int[Array, 'B V'] | None
    settings: SamplerRows


@flax.struct.dataclass
class Begun:
    """Rows that begin, whose prompts were read; in NumPy on the host.

    Attributes:
      slots: of each; beyond the last for one that fills up the shape.
      allowed: tokens that each may get, at least 1.
      seen: see `sampling.seen_in_prompts`; None where the rows have no adjustments.
      settings: of each, with adjustments where the rows have them.
    """

    slots: Int[Any, 'P']
    allowed: Int[Any, 'P']
    seen: UInt8[Any, 'P V'] | None
    settings: SamplerRows


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
    axes = ('batch', *[None] * (rows.ndim - 1))
    return place_whole(rows, partitioner.sharding(axes, rows.shape, 'prompts'))


def rows_of(num_prompts: int, partitioner: Partitioner | None) -> int:
    """Rows of a batch for so many prompts: few numbers, so that few programs serve all."""
    of_batch = partitioner.axis_size('batch') if partitioner else 1
    return -(-power_of_two(num_prompts) // of_batch) * of_batch


def empty_rows(model: LlamaForCausalLM, num_slots: int, room: int, settings: SamplerRows) -> Rows:
    """Free slots with room for so many tokens each; `settings` are as wide as what will begin in them."""

    def placed(x: np.ndarray) -> Array:
        return jnp.asarray(place(x, model.partitioner))

    none, seen = placed(np.zeros(num_slots, np.int32)), None
    if settings.adjustments:
        seen = placed(np.zeros((num_slots, model.config.vocab_size), np.int32))
    cache, settings = empty_cache(model, num_slots, room), jax.tree.map(placed, settings)
    # Of none of them two may be given away.
    rows = Rows(cache, none, none + 0, none + 0, none > 0, seen, settings)
    return rows if model.partitioner is None else placed_rows(model, rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_cache(model: LlamaForCausalLM, num_slots: int, room: int) -> KVCache:
    """Room for so many tokens in each slot, on the model's devices."""
    of_cache = model.cache_dtype, model.dtype, model.partitioner
    return _placed(model, KVCache.chosen(model.config, num_slots, room, *of_cache))


def _placed(model: LlamaForCausalLM, cache: KVCache) -> KVCache:
    if model.partitioner is None:
        return cache
    placed = cache.map(functools.partial(model.partitioner.shard, axes=cache.axes, name='cache'))
    return dataclasses.replace(placed, length=_by_row(model, cache.length))


def _by_row(model: LlamaForCausalLM, arrays: Any) -> Any:
    """Arrays by row, where the rows are: a program that finds them elsewhere would be compiled anew."""
    if (partitioner := model.partitioner) is None:
        return arrays
    shard = functools.partial(partitioner.shard, name='prompts')
    return jax.tree.map(lambda x: shard(x, axes=('batch', *[None] * (x.ndim - 1))), arrays)


@functools.partial(jax.jit, static_argnums=0)
def placed_rows(model: LlamaForCausalLM, rows: Rows) -> Rows:
    """Rows that lie as all programs leave them."""
    others = _by_row(model, dataclasses.replace(rows, cache=rows.cache.with_arrays(((), (), ()))))
    return dataclasses.replace(others, cache=_placed(model, rows.cache))


def read(
    model: LlamaForCausalLM,
    params: Params,
    cache: KVCache,
    slots: Int[Any, 'P'] | None,
    start: Int[Any, 'P'],
    tokens: Int[Any, 'P T'],
    counts: Int[Any, 'P'],
    is_first: bool = False,
) -> tuple[KVCache, Float[Array, 'P D']]:
    """As `extend`; pieces that begin their rows are read apart, by programs that serve caches of all rooms."""
    if not is_first:
        return extend(model, params, cache, slots, start, tokens, counts)
    room = min(cache.max_len, max(LEAST_ROOM, tokens.shape[1]))
    begun, last = begin(model, params, tokens, counts, room)
    if slots is None and room == cache.max_len:
        return begun, last  # all that the cache holds
    return _put(model, cache, slots, begun), last


@functools.partial(jax.jit, static_argnames=('model', 'room'))
def begin(
    model: LlamaForCausalLM, params: Params, tokens: Int[Array, 'P T'], counts: Int[Array, 'P'], room: int
) -> tuple[KVCache, Float[Array, 'P D']]:
    """The first piece of some prompts: a cache of it with so much room, and each one's last hidden state."""
    cache = empty_cache(model, len(tokens), room)
    is_long = tokens.shape[1] >= LONG_PIECE
    return extend(model, params, cache, None, jnp.zeros_like(counts), tokens, counts, is_long)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def _put(model: LlamaForCausalLM, cache: KVCache, slots: Int[Array, 'P'] | None, begun: KVCache) -> KVCache:
    """The cache with rows that `begin` gave."""
    slots = jnp.arange(len(begun.length)) if slots is None else slots
    return _placed(model, cache.put_rows(slots, begun))


@functools.partial(jax.jit, static_argnames=('model', 'is_first'), donate_argnames='cache')
def extend(
    model: LlamaForCausalLM,
    params: Params,
    cache: KVCache,
    slots: Int[Array, 'P'] | None,
    start: Int[Array, 'P'],
    tokens: Int[Array, 'P T'],
    counts: Int[Array, 'P'],
    is_first: bool = False,
) -> tuple[KVCache, Float[Array, 'P D']]:
    """A piece of some prompts, padded on the right to one width: the cache with it, and each one's last hidden state.

    Args:
      model: with whole rows.
      params: its weights, of layers apart.
      cache: with room for the padding too.
      slots: where each row is in the cache; beyond the last for one that fills up the shape. None: all, in order.
      start: tokens of each row before the piece.
      tokens: the piece.
      counts: tokens of each row in it.
      is_first: all rows begin with it, and the kernels of training read it: better ones from `LONG_PIECE` tokens on.
    """
    own = cache if slots is None else _placed(model, cache.take_rows(slots))
    own = dataclasses.replace(own, length=start, is_empty=is_first)
    hidden, written = model.apply({'params': params}, tokens, cache=own, method='hidden')
    assert isinstance(written, KVCache)
    # The padding behind a short row was read too: count only what is the row's, and the rest is overwritten.
    written = written.advance(counts)
    last = hidden[jnp.arange(len(counts)), jnp.maximum(counts - 1, 0)]
    if slots is not None:
        written = cache.put_rows(slots, written, start, tokens.shape[1])
    return _placed(model, written), last


@functools.partial(jax.jit, static_argnames=('model', 'num_candidates'), donate_argnames='rows')
def first(
    model: LlamaForCausalLM,
    params: Params,
    rows: Rows,
    last: Float[Array, 'P D'],
    begun: Begun,
    num_candidates: int = 0,
) -> tuple[Rows, Steps]:
    """Draws the first token of rows that begin, and puts them into their slots.

    Args:
      model: with whole rows.
      params: its weights.
      rows: all; the cache holds the prompts of those that begin.
      last: hidden states of the last tokens of the prompts.
      begun: what begins.
      num_candidates: see `Steps`.

    Returns:
      The rows, and one token of each that begins, in the order of `begun`.
    """
    logits = einsum('bd,vd->bv', last, head_weight(params), jnp.float32)
    seen = None if begun.seen is None else begun.seen.astype(jnp.int32)
    drawn = draw(begun.settings, logits, 0, seen)
    running = ~begun.settings.is_stop(drawn.token) & (begun.allowed > 1)

    def put(of_all: Array, new: Array) -> Array:
        return of_all.at[begun.slots].set(new.astype(of_all.dtype), mode='drop')

    if seen is not None:
        assert rows.seen is not None
        seen = put(rows.seen, count_drawn(seen, drawn.token))
    one = jnp.ones_like(drawn.token)
    changed = Rows(
        rows.cache, put(rows.token, drawn.token), put(rows.step, one), put(rows.allowed, begun.allowed),
        put(rows.running, running), seen, jax.tree.map(put, rows.settings, begun.settings.advance(drawn.token)),
    )  # fmt: skip
    steps = Steps.create(len(one), 1, num_candidates)
    steps = steps.add(lambda rows, new: rows.at[:, 0].set(new), drawn, logits, one)
    return placed_rows(model, changed), readable(model, dataclasses.replace(steps, running=running))


def decode_step(
    model: LlamaForCausalLM, params: Params, cache: KVCache, token: Int[Array, 'B']
) -> tuple[Float[Array, 'B V'], KVCache]:
    """One token more of every row is read: what may follow it, and the cache that holds it, not yet counted."""
    logits, written = model.apply({'params': params}, token[:, None], cache=cache)
    assert isinstance(written, KVCache)
    return logits[:, 0], dataclasses.replace(written, length=cache.length)


@functools.partial(jax.jit, static_argnames=('model', 'num_candidates'), donate_argnames='rows')
def decode(
    model: LlamaForCausalLM,
    params: Params,
    rows: Rows,
    is_done: Bool[Array, 'B'],
    num_steps: Int[Array, ''] | np.int32,
    num_candidates: int = 0,
) -> tuple[Rows, Steps]:
    """Gives every running row `num_steps` tokens, or as many as it may get, or up to a stop token.

    Args:
      model: with whole rows.
      params: its weights, of layers apart.
      rows: each running one with room in the cache for the steps.
      is_done: rows that get no more, as the host says.
      num_steps: at most `COLUMNS`.
      num_candidates: see `Steps`.
    """
    rows = dataclasses.replace(rows, running=rows.running & ~is_done)

    def body(carry):
        rows, steps, index = carry
        logits, written = decode_step(model, params, rows.cache, rows.token)
        return *_with_next(dataclasses.replace(rows, cache=written), steps, index, logits), index + 1

    def unfinished(carry):
        rows, _, index = carry
        return (index < num_steps) & jnp.any(rows.running)

    steps = Steps.create(len(rows.token), COLUMNS, num_candidates)
    rows, steps, _ = jax.lax.while_loop(unfinished, body, (rows, steps, jnp.int32(0)))
    return placed_rows(model, rows), readable(model, dataclasses.replace(steps, running=rows.running))


def _with_next(
    rows: Rows, steps: Steps, column: Int[Array, ''] | int, logits: Float[Array, 'B V']
) -> tuple[Rows, Steps]:
    """Gives every running row a token; the cache holds the one before, which is counted now."""
    # What a row that does not run wrote is beyond its tokens: it is not counted, so overwritten if need be.
    cache = dataclasses.replace(rows.cache, length=rows.cache.length + rows.running)
    drawn = draw(rows.settings, logits, rows.step, rows.seen)
    # All rows that run have as many, as they began with the first column.
    steps = steps.add(lambda rows, new: rows.at[:, column].set(new), drawn, logits, rows.running)
    seen = None if rows.seen is None else count_drawn(rows.seen, drawn.token)
    step = rows.step + rows.running
    running = rows.running & ~rows.settings.is_stop(drawn.token) & (step < rows.allowed)
    token = jnp.where(rows.running, drawn.token, rows.token)
    settings = rows.settings.advance(drawn.token)
    return Rows(cache, token, step, rows.allowed, running, seen, settings), steps


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def read_last(
    model: LlamaForCausalLM, params: Params, cache: KVCache, token: Int[Array, 'B']
) -> tuple[Float[Array, 'B V'], KVCache]:
    """The first half of a step, which asks for no settings: reads the last token of every row; see `decode_step`."""
    logits, written = decode_step(model, params, cache, token)
    return logits, _placed(model, written)


@functools.partial(jax.jit, static_argnames=('model', 'num_candidates'), donate_argnames='rows')
def draw_next(
    model: LlamaForCausalLM,
    rows: Rows,
    is_done: Bool[Array, 'B'],
    logits: Float[Array, 'B V'],
    num_candidates: int = 0,
) -> tuple[Rows, Steps]:
    """The second half: gives every running row a token, as `decode` does; of the cache only lengths are asked for."""
    rows = dataclasses.replace(rows, running=rows.running & ~is_done)
    steps = Steps.create(len(rows.token), COLUMNS, num_candidates)
    rows, steps = _with_next(rows, steps, 0, logits)
    return placed_rows(model, rows), readable(model, dataclasses.replace(steps, running=rows.running))


def readable(model: LlamaForCausalLM, found: Any) -> Any:
    """So that every process can read all of it."""
    if model.partitioner is None:
        return found
    return jax.lax.with_sharding_constraint(found, model.partitioner.sharding())


@functools.partial(jax.jit, static_argnames=('model', 'num_stops', 'adjusts'))
def widened(
    model: LlamaForCausalLM,
    settings: SamplerRows,
    seen: Int[Array, 'B V'] | None,
    num_stops: int,
    adjusts: bool,
) -> tuple[SamplerRows, Int[Array, 'B V'] | None]:
    """Settings with room for so many stop ids, and all that adjustments need, though no row asks for any yet."""
    wider = settings.widened(num_stops, adjusts)
    if adjusts and seen is None:
        seen = jnp.zeros((len(settings.seed), model.config.vocab_size), jnp.int32)
    return _by_row(model, (wider, seen))
