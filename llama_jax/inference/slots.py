"""Rows on the devices, as many and with as much room as a plan says; see `inference.decoding` for their programs."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from llama_jax.inference import decoding
from llama_jax.inference.cache_blocks import copy_block, put_block, reshaped
from llama_jax.inference.decode_weights import decode_weights
from llama_jax.inference.logits_processor import Follower, LogitsProcessor, RuledProcessor
from llama_jax.inference.request import NOTHING, CompletionRequest
from llama_jax.inference.sampling import STOP_IDS, SamplerRows, seen_in_prompts
from llama_jax.inference.steps import Steps
from llama_jax.inference.warming import run_all
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.ops.attention import platform_of
from llama_jax.types import Params

# Hidden states of prompts' last tokens, of which the first is the one that was asked for.
Hidden = Float[Array, 'P D']


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some tokens of a prompt, to be read into a slot behind its first `begin` ones."""

    slot: int
    begin: int
    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Begun:
    """A row whose prompt was read, which may get so many tokens, and what says which where it has a rule."""

    slot: int
    asked: CompletionRequest
    allowed: int
    follower: Follower | None = None


class Slots:
    """The rows of one model, each in a slot.

    Attributes:
      drafted: tokens that a draft proposed so far, and of them those that were taken.
    """

    drafted: tuple[int, int] = (0, 0)

    def __init__(
        self,
        model: LlamaForCausalLM,
        params: Params,
        num_candidates: int,
        processor: LogitsProcessor | None,
        adjusts: bool = False,
    ):
        """No rows yet.

        Args:
          model: its partitioner, where it has one, places the rows.
          params: its weights; see `decode_weights`.
          num_candidates: see `Steps`.
          processor: changes the logits of all rows.
          adjusts: rows have room for penalties and the like from the beginning, not once a request asks for any.
        """
        self._model = decoding.with_whole_rows(model)
        self._weights = decode_weights(params, model.dtype)
        self._num_candidates, self._processor = num_candidates, processor
        # What all requests so far need of the rows' settings.
        self._num_stops, self._adjusts = STOP_IDS, adjusts
        # On a mesh with several shards of the batch as many prompts are read at once; all but the first are nowhere.
        self._num_read = decoding.rows_of(1, model.partitioner)
        # A CPU would make the masks itself meanwhile; and all steps are of one program there, for the same bits.
        self._reads_ahead = platform_of(model.partitioner) != 'cpu'
        self._rows: decoding.Rows | None = None

    @functools.cached_property
    def token_bytes(self) -> int:
        """Of keys and values of one token in all layers."""
        cache = jax.eval_shape(functools.partial(decoding.empty_cache, self._model, self._num_read, 1))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.arrays))
        return size // self._num_read

    def expect(self, asked: CompletionRequest) -> None:
        """Makes room for the settings of a request, from the next `fit` on.

        Raises:
          InputError: one does not fit the model.
        """
        settings = self._settings([asked])
        self._num_stops = max(self._num_stops, settings.stop_ids.shape[1])
        self._adjusts |= settings.adjustments is not None

    def fit(self, num_rows: int, room: int) -> None:
        """So many slots with room for so many tokens each at least; up to twice as much room is kept, for the next."""
        if self._rows is None:
            settings = self._settings([NOTHING] * num_rows)
            self._rows = self._bound(decoding.empty_rows(self._model, num_rows, room, settings))
            return
        settings, has = self._rows.settings, self._rows.cache.max_len
        if self._num_stops > settings.stop_ids.shape[1] or (self._adjusts and settings.adjustments is None):
            settings, seen = decoding.widened(
                self._model, settings, self._rows.seen, self._num_stops, self._adjusts
            )
            self._rows = dataclasses.replace(self._rows, settings=settings, seen=seen)
        if has < room or has > 2 * room or len(self._rows.token) != num_rows:
            self._rows = reshaped(self._rows, num_rows, room)

    def read(self, pieces: Sequence[Piece], width: int) -> Hidden:
        """Reads pieces of prompts by a program for so many of `width` tokens; all begin their rows, or none."""
        rows = self._fitted()
        cache, last = decoding.read(self._model, self._weights, rows.cache, *self._arrays(pieces, width))
        self._rows = dataclasses.replace(rows, cache=cache)
        return last

    def _arrays(self, pieces: Sequence[Piece], width: int) -> tuple[Any, ...]:
        """What `decoding.read` is told of pieces."""
        num_slots, size = len(self._fitted().token), -(-len(pieces) // self._num_read) * self._num_read
        slots, tokens = np.full(size, num_slots, np.int32), np.zeros((size, width), np.int32)
        starts, counts = np.zeros((2, size), np.int32)
        for row, piece in enumerate(pieces):
            slots[row], starts[row], counts[row] = piece.slot, piece.begin, len(piece.tokens)
            tokens[row, : counts[row]] = piece.tokens
        starts, tokens, counts = map(self._place, (starts, tokens, counts))
        where = None if num_slots == size == 1 else self._place(slots)
        return where, starts, tokens, counts, pieces[0].begin == 0

    def first(self, last: Hidden, begun: Sequence[Begun]) -> Steps:
        """The first tokens of rows whose prompts were read; `begun` is in the order of their hidden states."""
        rows = self._fitted()
        nowhere = Begun(len(rows.token), NOTHING, 1)
        begun = [*begun, *[nowhere] * (len(last) - len(begun))]
        slots, most = np.array([(one.slot, one.allowed) for one in begun], np.int32).T
        settings, seen = self._settings([one.asked for one in begun]), None
        if settings.adjustments is not None:
            seen = seen_in_prompts([one.asked.tokens for one in begun], self._model.config.vocab_size)
        if isinstance(self._processor, RuledProcessor):
            state = self._processor.states([one.follower for one in begun])
            settings = dataclasses.replace(settings, state=state)
        arrays = jax.tree.map(self._place, decoding.Begun(slots, most, seen, settings))
        changed, steps = decoding.first(
            self._model, self._weights, _bare(rows), last, arrays, self._num_candidates
        )
        self._rows = _with_cache(changed, rows.cache)
        return steps

    def decode(
        self, slots: Collection[int], num_steps: int, followers: Mapping[int, Follower] | None = None
    ) -> Steps:
        """Some steps of the rows in these slots, one where somebody follows a row, by its slot; all others stop."""
        if followers and self._reads_ahead:
            return self._decode_in_halves(slots, followers)
        rows, done = self._with_states(self._fitted(), followers or {}), self._all_but(slots)
        self._rows, steps = decoding.decode(
            self._model, self._weights, rows, done, np.int32(num_steps), self._num_candidates
        )
        return steps

    def _decode_in_halves(self, slots: Collection[int], followers: Mapping[int, Follower]) -> Steps:
        """A step of the rows in these slots; the devices work on it while the host finds out what may come."""
        rows, done = self._fitted(), self._all_but(slots)
        logits, cache = decoding.read_last(self._model, self._weights, rows.cache, rows.token)
        rows = self._with_states(dataclasses.replace(rows, cache=cache), followers)
        changed, steps = decoding.draw_next(self._model, _bare(rows), done, logits, self._num_candidates)
        self._rows = _with_cache(changed, cache)
        return steps

    def _with_states(self, rows: decoding.Rows, followers: Mapping[int, Follower]) -> decoding.Rows:
        """Rows with what those who follow them say, by slot, where the processor asks for it."""
        if not isinstance(self._processor, RuledProcessor):
            return rows
        state = self._processor.states([followers.get(slot) for slot in range(len(rows.token))])
        settings = dataclasses.replace(rows.settings, state=self._bound(jax.tree.map(self._place, state)))
        return dataclasses.replace(rows, settings=settings)

    def _all_but(self, slots: Collection[int]) -> np.ndarray | Array:
        """Of every row, whether it is in none of these slots."""
        others = np.ones(len(self._fitted().token), bool)
        others[list(slots)] = False
        return self._place(others)

    def copy(self, slot: int, begin: int, width: int) -> Any:
        """Keys and values of some tokens, which `put` takes."""
        return copy_block(self._fitted().cache, np.int32(slot), np.int32(begin), width)

    def put(self, slot: int, begin: int, block: Any, length: int) -> None:
        """What `copy` gave goes into a slot, which then has `length` tokens."""
        rows = self._fitted()
        cache = put_block(rows.cache, np.int32(slot), np.int32(begin), block, np.int32(length))
        self._rows = dataclasses.replace(rows, cache=cache)

    def to_device(self, block: Any) -> Any:
        """What `copy` gave, from the host to where it came from."""
        return self._moved(block, self._fitted().cache)

    def _moved(self, block: Any, cache: KVCache) -> Any:
        """What was copied of such a cache, from the host to where it came from."""
        if (partitioner := self._model.partitioner) is None:
            return self._bound(block)

        axes = cache.axes[1:]

        def move(array: np.ndarray) -> Array:
            return jax.device_put(array, partitioner.sharding(axes, array.shape, 'block of a prompt'))

        return jax.tree.map(move, block)

    def _bound(self, arrays: Any) -> Any:
        """Arrays bound to their device, as programs give them back: for those that are not, they are compiled anew."""
        sharding = jax.tree.leaves(self._weights)[0].sharding
        if sharding.num_devices > 1:
            return arrays
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.device_put(arrays, sharding)

    def compile(
        self,
        rooms: Mapping[int, int],
        widths: Mapping[int, int],
        later: Mapping[int, int],
        grid: int,
        also: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Compiles every program, before there are rows.

        Args:
          rooms: of a row, and with each how many rows there are.
          widths: of pieces that begin a prompt, and of each how many may be read at once.
          later: the same of those that go on with one.
          grid: width of a block that is kept.
          also: what else compiles programs of the model.
        """
        assert self._rows is None

        def alone(compile_some: Callable[..., None], *args: Any) -> Callable[[], None]:
            return lambda: compile_some(copy.copy(self), *args)

        # What all rooms share comes first, lest two compile it.
        lasts: dict[int, Hidden] = {}
        begins = [
            alone(Slots._compile_begin, rooms, width, {1, widths[width]}, lasts)
            for width in sorted(widths)[::-1]
        ]
        run_all(begins, self._model)
        of_rooms = [
            alone(Slots._compile_room, room, rooms, widths, later, grid) for room in sorted(rooms)[::-1]
        ]
        run_all([alone(Slots._compile_first, rooms, lasts), *of_rooms, *also], self._model)
        before = self._adjusts
        for room in rooms:
            for other, other_rows in rooms.items():
                self._start(True, rooms, room)
                reshaped(self._fitted(), other_rows, other)
        self._rows, self._adjusts = None, before

    def _start(self, adjusts: bool, rooms: Mapping[int, int], room: int) -> None:
        """Rows with so much room, with or without adjustments."""
        self._rows, self._adjusts = None, adjusts
        self.fit(rooms[room], room)

    def _compile_begin(
        self, rooms: Mapping[int, int], width: int, numbers: Collection[int], lasts: dict[int, Hidden]
    ) -> None:
        """Compiles what reads pieces of a width that begin prompts; `lasts` gets what reading so many gives."""
        room = min(room for room in rooms if room >= width)
        self._start(self._adjusts, rooms, room)
        for number in numbers:
            lasts[number] = self.read([Piece(rooms[room], 0, ())] * number, width)  # in no slot

    def _compile_first(self, rooms: Mapping[int, int], lasts: Mapping[int, Hidden]) -> None:
        """Compiles what draws first tokens."""
        for adjusts in sorted({self._adjusts, True}):
            for room in {num_rows: room for room, num_rows in rooms.items()}.values():
                self._start(adjusts, rooms, room)
                for last in lasts.values():
                    self.first(last, ())

    def _compile_room(
        self,
        room: int,
        rooms: Mapping[int, int],
        widths: Mapping[int, int],
        later: Mapping[int, int],
        grid: int,
    ) -> None:
        """Compiles what rows with so much room need."""
        num_rows = rooms[room]
        for adjusts in sorted({self._adjusts, True}):
            self._start(adjusts, rooms, room)
            self.decode((), 0)
            if isinstance(self._processor, RuledProcessor) and self._reads_ahead:
                self._decode_in_halves((), {})
        begun = {
            (max(width, decoding.LEAST_ROOM), n): width for width, most in widths.items() for n in (1, most)
        }
        for (_, number), width in begun.items():
            if width <= room:
                self.read([Piece(num_rows, 0, ())] * number, width)
        # Pieces but the last are a block wide, so only what has room for more can go on with a prompt.
        for width, at_once in later.items() if room > grid else ():
            for number in {1, at_once}:
                self.read([Piece(num_rows, 1, ())] * number, width)
        for width in {grid, *rooms}:
            if width <= room:
                self.put(0, 0, self.copy(0, 0, width), 0)

    def _fitted(self) -> decoding.Rows:
        assert self._rows is not None
        return self._rows

    def _settings(self, asked: Sequence[CompletionRequest]) -> SamplerRows:
        """Of some rows, as wide as those on the devices are to be."""
        settings = SamplerRows.create(
            [one.sampler for one in asked],
            [one.stream for one in asked],
            [one.stop_ids for one in asked],
            self._model.config.vocab_size,
            adjusts=self._adjusts,
            num_stops=self._num_stops,
        )
        if self._processor is None:
            return settings
        longest = decoding.power_of_two(self._model.config.max_seq_len)
        state = self._processor.begin([one.tokens for one in asked], longest)
        return dataclasses.replace(settings, processor=self._processor, state=state)

    def _place(self, rows: np.ndarray) -> np.ndarray | Array:
        return decoding.place(rows, self._model.partitioner)


def _bare(rows: decoding.Rows) -> decoding.Rows:
    """For programs that read nothing of the cache but lengths: one of them serves all its rooms."""
    return dataclasses.replace(rows, cache=rows.cache.with_arrays(((), (), ())))


def _with_cache(rows: decoding.Rows, cache: KVCache) -> decoding.Rows:
    """Rows that such a program gave, with the cache that they have."""
    return dataclasses.replace(rows, cache=dataclasses.replace(cache, length=rows.cache.length))
