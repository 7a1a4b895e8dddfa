"""Speculative decoding: several tokens a step, proposed cheaply and verified by one pass of the model over all of them.

Exact in distribution, whatever is proposed (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, algorithm 1;
Chen et al. 2023, https://arxiv.org/abs/2302.01318): the distributions are those after penalties, temperature and
filters, position by position. What is rejected costs nothing but its part of the pass: the cache's row is as long as
what was accepted, and the rest is overwritten.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.errors import InputError
from llama_jax.inference import decoding
from llama_jax.inference.cache_blocks import copy_block, put_block, reshaped
from llama_jax.inference.decode_weights import decode_weights
from llama_jax.inference.decoding import COLUMNS, Rows, readable
from llama_jax.inference.logits_processor import Follower
from llama_jax.inference.proposers import Draft, Heard, Proposal, Proposer, draft_keys
from llama_jax.inference.sampling import Drawn, SamplerRows, count_drawn, draw, draw_tokens
from llama_jax.inference.slots import Hidden, Piece, Slots
from llama_jax.inference.steps import Steps
from llama_jax.models.config import LlamaConfig
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.types import Params

# Tokens that may be proposed at once.
MAX_PROPOSED = 32
_TILE = 128


def verify(
    settings: SamplerRows,
    logits: Float[Array, 'B T V'],
    proposal: Proposal,
    step: Int[Array, 'B'],
    seen: Int[Array, 'B V'] | None = None,
) -> tuple[Int[Array, 'B'], Drawn]:
    """How many proposed tokens each row takes, and its next tokens: these, and one that was drawn in the next's place.

    A token that was drawn by q, where the model draws by p, is taken with probability min(1, p / q). In place of the
    first that is not one is drawn by what p has above q; if all are taken, the one behind them is drawn by p. Tokens
    that were not drawn are taken where they are what would be drawn without them by the same seed: with probability p.

    Args:
      settings: of the rows.
      logits: of the model, where the newest token and every proposed one was read: T is one more than was proposed.
      proposal: what was proposed.
      step: number of the first proposed token.
      seen: see `sampling.seen_in_prompts`, without the proposed ones; needed where the settings have adjustments.
    """
    batch, num_places, vocab_size = logits.shape
    every = jax.tree.map(lambda rows: jnp.repeat(rows, num_places, axis=0), settings)
    steps = (step[:, None] + jnp.arange(num_places)[None]).reshape(-1)
    flat, seen = logits.reshape(-1, vocab_size).astype(jnp.float32), _seen_by_place(seen, proposal.tokens)
    if proposal.logits is None:
        drawn = jax.tree.map(lambda x: x.reshape(batch, -1), draw(every, flat, steps, seen))
        return _leading(drawn.token[:, :-1] == proposal.tokens), drawn

    filtered = every.filter(every.adjust(flat, seen, steps)).reshape(logits.shape)
    p, q = (jax.nn.log_softmax(x, axis=-1) for x in (filtered, proposal.logits))
    keys = draft_keys(every, steps).reshape(batch, num_places, 3)
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(keys[:, :-1, 1])
    ratio = _chosen(p[:, :-1], proposal.tokens) - _chosen(q, proposal.tokens)
    count = _leading(jnp.log(uniform) < ratio)

    def at(x: Array) -> Array:
        """What stands where the row's own token is drawn; nothing is proposed behind the last that is proposed."""
        return jnp.take_along_axis(x, count[:, None, None], axis=1)[:, 0]

    own_p, own_q = at(p), at(jnp.pad(q, ((0, 0), (0, 1), (0, 0)), constant_values=-jnp.inf))
    above = jnp.maximum(jnp.exp(own_p) - jnp.exp(own_q), 0)
    # Of equal distributions nothing is rejected but by rounding; then nothing may be left.
    own = jnp.where(jnp.any(above > 0, axis=-1, keepdims=True), jnp.log(above), own_p)
    own_keys = jnp.take_along_axis(keys[..., 2], count[:, None], axis=1)[:, 0]
    own = draw_tokens(own_keys, own)
    tokens = jnp.pad(proposal.tokens, ((0, 0), (0, 1))).at[jnp.arange(batch), count].set(own)
    raw = jax.nn.log_softmax(flat, axis=-1).reshape(logits.shape)
    return count, Drawn(tokens, _chosen(raw, tokens), _chosen(p, tokens))


def count_taken(
    seen: Int[Array, 'B V'], tokens: Int[Array, 'B T'], count: Int[Array, 'B']
) -> Int[Array, 'B V']:
    """`seen` after the first `count` tokens more of each row."""
    for column in range(tokens.shape[1]):
        seen = jnp.where((column < count)[:, None], count_drawn(seen, tokens[:, column]), seen)
    return seen


@flax.struct.dataclass
class Memory:
    """What proposers know of rows, beside `decoding.Rows`.

    Attributes:
      tokens: of prompt and completion; their number is the rows' own.
      cache: of a draft; of no layers where no model proposes.
    """

    tokens: Int[Array, 'B S']
    cache: KVCache


def empty_memory(
    model: LlamaForCausalLM, proposer: Proposer, num_slots: int, room: int, longest: int
) -> Memory:
    """Of free slots, with room for so many tokens in a cache, and for the longest row that there may be."""

    def placed(rows: np.ndarray) -> Array:
        return jnp.asarray(decoding.place(rows, model.partitioner))

    if isinstance(proposer, Draft):
        cache = decoding.empty_cache(proposer.model, num_slots, room)
    else:
        cache = KVCache((), (), placed(np.zeros(num_slots, np.int32)))
    return Memory(placed(np.zeros((num_slots, longest), np.int32)), cache)


def read(
    proposer: Proposer,
    memory: Memory,
    slots: Int[Any, 'P'] | None,
    start: Int[Any, 'P'],
    tokens: Int[Any, 'P T'],
    counts: Int[Any, 'P'],
    is_first: bool = False,
) -> Memory:
    """A piece of some prompts goes where `decoding.read`, of the same arguments, puts it."""
    cache = memory.cache
    if isinstance(proposer, Draft):
        cache, _ = decoding.read(
            proposer.model, proposer.params, cache, slots, start, tokens, counts, is_first
        )
    where = jnp.arange(len(start)) if slots is None else slots
    return Memory(_note(memory.tokens, where, start, tokens), cache)


@functools.partial(jax.jit, donate_argnums=0)
def _note(
    rows: Int[Array, 'B S'], slots: Int[Array, 'P'], start: Int[Array, 'P'], tokens: Int[Array, 'P T']
) -> Int[Array, 'B S']:
    places = start[:, None] + jnp.arange(tokens.shape[1])[None]
    return rows.at[slots[:, None], places].set(tokens, mode='drop')


@functools.partial(jax.jit, static_argnames=('model', 'num_candidates'), donate_argnames=('rows', 'memory'))
def decode(
    model: LlamaForCausalLM,
    params: Params,
    proposer: Proposer,
    rows: Rows,
    memory: Memory,
    is_done: Bool[Array, 'B'],
    num_steps: Int[Array, ''] | np.int32,
    num_candidates: int = 0,
) -> tuple[Rows, Memory, Steps, Int[Array, 'B']]:
    """As `decoding.decode`, but rows come to different numbers of tokens: it ends before one may get too many.

    A pass is made whole or not at all, so what a row is given does not depend on the others.

    Args:
      model: with whole rows.
      params: its weights, of layers apart.
      proposer: as `prepare` gives it.
      rows: each running one with room for two passes in the cache; it ends too where one has no more.
      memory: of the rows.
      is_done: rows that get no more, as the host says.
      num_steps: tokens of a row: as many as a pass may give, or as any row may get, and at most `COLUMNS`.
      num_candidates: see `Steps`.

    Returns:
      The rows, the memory, what each row was given, and how many passes of the model gave it.
    """
    width = proposer.num_tokens + 1
    rows = dataclasses.replace(rows, running=rows.running & ~is_done)
    tokens = _put_behind(memory.tokens, rows.token[:, None], rows.cache.length, jnp.ones_like(rows.token))

    def body(carry):
        rows, tokens, cache, steps, passes = carry
        settings, length = rows.settings, rows.cache.length
        cache, proposal = proposer.propose(cache, Heard(tokens, length, rows.step, rows.seen, settings))
        read = jnp.concatenate([rows.token[:, None], proposal.tokens], axis=1)
        logits, written = model.apply({'params': params}, read, cache=rows.cache)
        assert isinstance(written, KVCache)
        taken, drawn = verify(settings, logits, proposal, rows.step, rows.seen)
        # A row gets what was taken and one token more, but none behind one that ends it.
        step = rows.step[:, None] + jnp.arange(1, width + 1)[None]
        is_last = jax.vmap(settings.is_stop, 1, 1)(drawn.token) | (step >= rows.allowed[:, None])
        count = jnp.where(rows.running, jnp.minimum(taken, _leading(~is_last)) + 1, 0)

        def of_last(x: Array, without: Array) -> Array:
            last = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
            return jnp.where(count > 0, last, without)

        rows = Rows(
            cache=dataclasses.replace(written, length=length + count),
            token=of_last(drawn.token, rows.token),
            step=rows.step + count,
            allowed=rows.allowed,
            running=of_last(~is_last, rows.running),
            seen=None if rows.seen is None else count_taken(rows.seen, drawn.token, count),
            settings=settings,
        )
        tokens = _put_behind(tokens, drawn.token, length + 1, count)
        put = functools.partial(_put_behind, start=steps.count, count=count)
        steps = steps.add(put, drawn, logits, count)
        return rows, tokens, cache, steps, passes + (count > 0)

    def unfinished(carry):
        rows, _, _, steps, _ = carry
        most = steps.count + jnp.minimum(width, rows.allowed - rows.step)
        fits = (most <= num_steps) & (rows.cache.length + 2 * width <= rows.cache.max_len)
        return jnp.any(rows.running) & jnp.all(fits | ~rows.running)

    steps = Steps.create(len(is_done), COLUMNS, num_candidates)
    carry = (rows, tokens, memory.cache, steps, jnp.zeros(len(is_done), jnp.int32))
    rows, tokens, cache, steps, passes = jax.lax.while_loop(unfinished, body, carry)
    steps = dataclasses.replace(steps, running=rows.running)
    return decoding.placed_rows(model, rows), Memory(tokens, cache), *readable(model, (steps, passes))


def _put_behind(rows: Array, new: Array, start: Int[Array, 'B'], count: Int[Array, 'B']) -> Array:
    """Rows with the first `count` of some new values of each from `start` on."""
    place, every = jnp.arange(new.shape[1])[None], jnp.arange(len(rows))[:, None]
    places = jnp.where(place < count[:, None], start[:, None] + place, rows.shape[1])
    return rows.at[every, places].set(new, mode='drop')


def prepare(model: LlamaForCausalLM, proposer: Proposer) -> Proposer:
    """The proposer with the weights that steps read.

    Raises:
      InputError: it proposes too many tokens at once, or has other tokens or devices than the model.
    """
    if not 1 <= proposer.num_tokens <= MAX_PROPOSED:
        raise InputError(f'a draft proposes {proposer.num_tokens} tokens; it may be 1 to {MAX_PROPOSED}')
    if not isinstance(proposer, Draft):
        return proposer
    check_vocabulary(model.config, proposer.model.config)
    draft = decoding.with_whole_rows(proposer.model)
    if draft.partitioner != model.partitioner:
        raise InputError('the draft is placed by another partitioner than the model; give both the same')
    return dataclasses.replace(proposer, model=draft, params=decode_weights(proposer.params, draft.dtype))


def check_vocabulary(config: LlamaConfig, draft: LlamaConfig) -> None:
    """Refuses a draft that cannot have the model's tokens.

    Raises:
      InputError: as said.
    """
    if draft.vocab_size != config.vocab_size:
        raise InputError(
            f'the draft has rows for {draft.vocab_size} tokens, the model for {config.vocab_size}; a draft has the '
            "model's own tokens"
        )


class SpeculativeSlots(Slots):
    """Rows that are given several tokens a pass, as a proposer has them.

    Attributes:
      given: tokens that rows were given, but for the first of each.
      passes: of the model that gave them, each counted once for every row that it gave some.
    """

    def __init__(self, proposer: Proposer, model: LlamaForCausalLM, *options: Any):
        """No rows yet.

        Args:
          proposer: proposes tokens.
          model: see `Slots`.
          options: of `Slots`.

        Raises:
          InputError: the proposer does not fit the model, or the rows have a processor.
        """
        super().__init__(model, *options)
        self._proposer = prepare(self._model, proposer)
        if self._processor is not None:
            raise InputError(
                'a draft and a logits_processor are both given; a processor follows a row token by token, so give one '
                'of them'
            )
        self._memory: Memory | None = None
        self.given = self.passes = 0
        # Behind each row there is room for a pass, and for another of a row which has ended and is not to lose what
        # counts; as much as tiles of attention divide.
        self._spare = -(-2 * (proposer.num_tokens + 1) // _TILE) * _TILE

    def fit(self, num_rows: int, room: int) -> None:
        """With room for what is proposed."""
        super().fit(num_rows, room + self._spare)
        shape = num_rows, self._fitted().cache.max_len
        if self._memory is None:
            longest = decoding.power_of_two(self._model.config.max_seq_len) + self._spare
            self._memory = empty_memory(self._model, self._proposer, *shape, longest)
        self._memory = reshaped(self._memory, *shape)

    def read(self, pieces: Sequence[Piece], width: int) -> Hidden:
        """By the proposer too."""
        self._memory = read(self._proposer, self._remembered(), *self._arrays(pieces, width))
        return super().read(pieces, width)

    def decode(
        self, slots: Collection[int], num_steps: int, followers: Mapping[int, Follower] | None = None
    ) -> Steps:
        """Steps of one to several tokens, of rows that nobody follows."""
        assert not followers
        self._rows, self._memory, steps, passes = decode(
            self._model, self._weights, self._proposer, self._fitted(), self._remembered(), self._all_but(slots),
            np.int32(num_steps), self._num_candidates,
        )  # fmt: skip
        self.given += int(np.sum(jax.device_get(steps.count)))
        self.passes += int(np.sum(jax.device_get(passes)))
        self.drafted = self.passes * self._proposer.num_tokens, self.given - self.passes
        return steps

    def copy(self, slot: int, begin: int, width: int) -> Any:
        """With the proposer's memory of it."""
        memory = self._remembered()
        tokens = jax.lax.dynamic_slice(memory.tokens, (slot, begin), (1, width))
        own = copy_block(memory.cache, np.int32(slot), np.int32(begin), width)
        return super().copy(slot, begin, width), tokens, own

    def put(self, slot: int, begin: int, block: Any, length: int) -> None:
        """With the proposer's memory of it."""
        block, tokens, own = block
        super().put(slot, begin, block, length)
        memory = self._remembered()
        where = (np.int32(slot), np.int32(begin))
        cache = put_block(memory.cache, *where, own, np.int32(length))
        self._memory = Memory(jax.lax.dynamic_update_slice(memory.tokens, tokens, where), cache)

    def to_device(self, block: Any) -> Any:
        """With the proposer's memory of it."""
        block, tokens, own = block
        return super().to_device(block), self._place(tokens), self._moved(own, self._remembered().cache)

    def describe(self) -> str:
        """One line on what the passes gave."""
        proposed, taken = self.drafted
        return (
            f'{self.given} tokens in {self.passes} passes of the model, {self.given / max(1, self.passes):.2f} each: '
            f'{taken / max(1, proposed):.0%} of what was proposed was taken'
        )

    def _remembered(self) -> Memory:
        assert self._memory is not None
        return self._memory


def _seen_by_place(seen: Array | None, proposed: Int[Array, 'B k']) -> Int[Array, 'BT V'] | None:
    """What is seen where each proposed token was read, and before them."""
    if seen is None:
        return None
    places = [seen]
    for column in range(proposed.shape[1]):
        places.append(count_drawn(places[-1], proposed[:, column]))
    return jnp.stack(places, axis=1).reshape(-1, seen.shape[-1])


def _leading(is_taken: Array) -> Int[Array, 'B']:
    """How many there are up to the first that is not."""
    return jnp.sum(jnp.cumprod(is_taken.astype(jnp.int32), axis=1), axis=1)


def _chosen(x: Float[Array, 'B k V'], tokens: Int[Array, 'B k']) -> Float[Array, 'B k']:
    return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]
