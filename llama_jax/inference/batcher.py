"""Who gets which slot when: requests of any length, at any time, through a fixed number of rows that decode together.

A pure state machine on the host. `submit` and `cancel` say what is wanted; `plan` says what the devices do next, a
piece of one prompt or some steps of all running rows; `absorb` hears what came of it. The devices do dispatches in the
order in which they were planned, so the next may be planned, and sent, before the last is absorbed: what is not known
yet is taken at its most, and a row that has ended meanwhile only makes its slot free a little later.

A prompt is cut by its own length and by what of it is cached, never by what else runs; all decisions follow from the
order of the calls, so every process of a job that makes the same calls decides the same.
"""

import dataclasses
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

from llama_jax.inference.prefix_cache import Block, PrefixCache
from llama_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
      id: its own among those that have not ended.
      tokens: of the prompt, at least one.
      max_new_tokens: at least one; with the prompt they fit into the context.
      key: whose it is; keys take turns.
    """

    id: Hashable
    tokens: Sequence[int]
    max_new_tokens: int
    key: str = ''

    @property
    def reach(self) -> int:
        """Tokens that its row may come to have."""
        return len(self.tokens) + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Share:
    """What a dispatch may give to a request.

    Attributes:
      slot: of its row.
      request: that has the slot; whoever has it later has no part in this.
      steps: new tokens at most; it gets them unless it ends.
    """

    slot: int
    request: Request
    steps: int


@dataclasses.dataclass(frozen=True)
class Extend:
    """A piece of a prompt is read into a slot, behind the first `begin` tokens; those behind them are forgotten.

    Attributes:
      slot: to read into.
      request: of the prompt.
      begin: tokens of it that stand before the piece, cached ones included.
      end: where the piece ends.
      width: tokens that the program reads; those from `end` on are padding.
      blocks: cached beginning of the prompt, `begin` tokens, to put into the slot first; of a first piece alone.
      room: as `Decode`.
      num_rows: as `Decode`.
      shares: the last piece of a prompt gives its first new token.
    """

    slot: int
    request: Request
    begin: int
    end: int
    width: int
    blocks: tuple[Block, ...]
    room: int
    num_rows: int
    shares: tuple[Share, ...]

    @property
    def tokens(self) -> Sequence[int]:
        """Of the piece, without padding."""
        return self.request.tokens[self.begin : self.end]

    @property
    def is_last(self) -> bool:
        """Of its prompt."""
        return self.end == len(self.request.tokens)


@dataclasses.dataclass(frozen=True)
class Decode:
    """Some steps of all rows that run; the others stand still.

    Attributes:
      steps: of the program; a row with a smaller share ends in it.
      room: tokens that the cache must have room for in each row: the power of two that covers all that rows with a
        request hold when this is done, and the next piece of one that is being read.
      num_rows: rows that the cache may have then; the slots in use are among the first of them.
      shares: of the rows that run, by slot.
    """

    steps: int
    room: int
    num_rows: int
    shares: tuple[Share, ...]


Dispatch = Extend | Decode


@dataclasses.dataclass(frozen=True)
class Ended:
    """A request that is over.

    Attributes:
      request: which.
      reason: it met what ends a text, has all its tokens, or was cancelled.
      num_tokens: new ones that were absorbed.
      cached_tokens: of its prompt that were not read again.
    """

    request: Request
    reason: Literal['stop', 'length', 'cancelled']
    num_tokens: int
    cached_tokens: int


@dataclasses.dataclass
class _Row:
    """A request with a slot.

    Attributes:
      request: whose row it is.
      blocks: cached beginning of its prompt, kept until all is read.
      cached: tokens in them.
      read: tokens of the prompt that are read, by what is planned.
      given: new tokens absorbed.
      planned: new tokens at most that are planned and not absorbed.
    """

    request: Request
    blocks: list[Block]
    cached: int
    read: int
    given: int = 0
    planned: int = 0

    @property
    def remaining(self) -> int:
        """New tokens at most that are still to be planned."""
        return self.request.max_new_tokens - self.given - self.planned

    @property
    def is_reading(self) -> bool:
        return self.read < len(self.request.tokens)


class Batcher:
    """Requests that wait, and rows that are read or decoded."""

    def __init__(
        self,
        *,
        num_slots: int,
        context: int,
        budget_tokens: int,
        grid: int,
        widths: Sequence[int],
        steps: tuple[int, int],
        prefix_cache: PrefixCache | None = None,
    ):
        """Nothing waits yet.

        Args:
          num_slots: rows that are decoded together, at most.
          context: tokens that a row may have.
          budget_tokens: that memory holds, of all rows together: (rows in use) x (the longest one's room).
          grid: tokens of a piece, a power of two; also the least room.
          widths: that the last piece of a prompt may have; it gets the least that covers it. `grid` is always one.
          steps: of a dispatch at most, (while nothing waits, while something does).
          prefix_cache: of blocks of `grid` tokens.

        Raises:
          InputError: memory does not hold one row.
        """
        assert grid & (grid - 1) == 0 and max(widths, default=grid) <= grid and min(steps) > 0
        assert prefix_cache is None or prefix_cache.block_tokens == grid
        if budget_tokens < grid:
            raise InputError(
                f'memory holds {budget_tokens} tokens; {grid} are the least that one row takes, so give it more'
            )
        self.num_slots, self.context, self.budget_tokens = num_slots, context, budget_tokens
        self.grid, self.widths = grid, tuple(sorted({*widths, grid}))
        self.steps_alone, self.steps_before_others = steps
        self.prefix_cache = prefix_cache
        self._waiting: dict[str, deque[Request]] = {}  # by key, in the order of their turns
        self._rows: list[_Row | None] = [None] * num_slots
        self._read_last = False

    def submit(self, request: Request) -> None:
        """Lets a request wait for a slot.

        Raises:
          InputError: memory would not hold it even alone.
        """
        assert request.tokens and request.max_new_tokens > 0 and request.reach <= self.context
        if (room := self._room_of(request.reach)) > self.budget_tokens:
            raise InputError(
                f'a prompt of {len(request.tokens)} tokens with up to {request.max_new_tokens} new ones takes room '
                f'for {room}; memory holds {self.budget_tokens}, so shorten it or ask for fewer'
            )
        request = dataclasses.replace(request)  # an object of its own, which `absorb` knows it by
        self._waiting.setdefault(request.key, deque()).append(request)

    def cancel(self, id: Hashable) -> Ended | None:
        """Ends a request, if it has not ended; its slot is free from the next dispatch on."""
        for slot, row in enumerate(self._rows):
            if row is not None and row.request.id == id:
                return self._end(slot, row, 'cancelled')
        for queue in self._waiting.values():
            for request in queue:
                if request.id == id:
                    queue.remove(request)
                    self._drop_empty(request.key)
                    return Ended(request, 'cancelled', 0, 0)
        return None

    def plan(self) -> Dispatch | None:
        """What the devices do next; None where all that is left to know is in dispatches not yet absorbed."""
        runs = any(row.remaining > 0 for _, row in self._held() if not row.is_reading)
        if not (runs and self._read_last) and (slot := self._slot_to_read()) is not None:
            self._read_last = True
            return self._extend(slot)
        self._read_last = False
        return self._decode() if runs else None

    def absorb(
        self,
        dispatch: Dispatch,
        counts: Mapping[int, int] | Sequence[int],
        stopped: Mapping[int, bool] | Sequence[bool],
    ) -> list[Ended]:
        """Hears what came of a dispatch, in the order of planning.

        Args:
          dispatch: as planned.
          counts: new tokens of each slot that has a share.
          stopped: whether each such slot met what ends a text, in the last of them.

        Returns:
          What has ended by it.
        """
        ended = []
        for share in dispatch.shares:
            row = self._rows[share.slot]
            if row is None or row.request is not share.request:
                continue  # cancelled, or ended in a dispatch before
            assert 0 <= counts[share.slot] <= share.steps
            row.planned -= share.steps
            row.given += int(counts[share.slot])
            if isinstance(dispatch, Extend):
                self._give_back(row)
            if stopped[share.slot]:
                ended.append(self._end(share.slot, row, 'stop'))
            elif row.given == row.request.max_new_tokens:
                ended.append(self._end(share.slot, row, 'length'))
        return ended

    def rooms(self) -> dict[int, int]:
        """{room: rows that the cache may have}, of all programs that there can be."""
        largest = min(self._room_of(self.context), 1 << (self.budget_tokens.bit_length() - 1))
        rooms = [1 << power for power in range(self.grid.bit_length() - 1, largest.bit_length())]
        return {room: self._num_rows(room) for room in rooms}

    def memory_plan(self, token_bytes: int) -> str:
        """One line on what is held where, to be logged.

        Args:
          token_bytes: of keys and values of one token, in all layers.
        """
        longest: dict[int, int] = {}  # room of each number of rows
        for room, num_rows in self.rooms().items():
            longest[num_rows] = min(room, self.context)
        cache = max(room * num_rows for room, num_rows in self.rooms().items())
        rows = ', '.join(f'{num_rows} of up to {room:,} tokens' for num_rows, room in longest.items())
        line = f'rows: {rows}; at most {cache:,} tokens, {cache * token_bytes / 2**30:.2f} GiB'
        if (prefixes := self.prefix_cache) is None:
            return line
        return (
            f'{line}; beginnings of prompts: {prefixes.max_device_bytes / 2**30:.2f} GiB on the devices, '
            f'{prefixes.max_host_bytes / 2**30:.2f} GiB on the host, in blocks of {self.grid} tokens'
        )

    def _held(self) -> list[tuple[int, _Row]]:
        return [(slot, row) for slot, row in enumerate(self._rows) if row is not None]

    def _slot_to_read(self) -> int | None:
        """Of the prompt that is being read, else of the next one, if there is room for it."""
        reading = next((slot for slot, row in self._held() if row.is_reading), None)
        return self._admit() if reading is None else reading

    def _admit(self) -> int | None:
        """Gives the next request a slot. Where it must wait for memory nobody overtakes it, lest it wait for ever."""
        if not self._waiting or None not in self._rows:
            return None
        key, queue = next(iter(self._waiting.items()))
        request, slot = queue[0], self._rows.index(None)
        slots, reaches = [slot], [request.reach]
        for taken, row in self._held():
            slots.append(taken)
            reaches.append(row.request.reach)
        if max(slots) >= self._num_rows(self._room_of(max(reaches))):
            return None
        queue.popleft()
        self._waiting[key] = self._waiting.pop(key)  # behind the others
        self._drop_empty(key)
        blocks = [] if self.prefix_cache is None else self.prefix_cache.match(request.tokens)
        cached = len(blocks) * self.grid
        self._rows[slot] = _Row(request, blocks, cached, cached)
        return slot

    def _drop_empty(self, key: str) -> None:
        if not self._waiting[key]:
            del self._waiting[key]

    def _extend(self, slot: int) -> Extend:
        row = self._rows[slot]
        assert row is not None
        begin, width = self._next_piece(row)
        row.read = end = min(begin + width, len(row.request.tokens))
        row.planned = int(not row.is_reading)
        shares = (Share(slot, row.request, 1),) if row.planned else ()
        blocks = tuple(row.blocks) if begin == row.cached else ()
        return Extend(slot, row.request, begin, end, width, blocks, *self._shape(), shares)

    def _next_piece(self, row: _Row) -> tuple[int, int]:
        """Where it begins, and its width."""
        left = len(row.request.tokens) - row.read
        return row.read, next((width for width in self.widths if width >= left), self.grid)

    def _decode(self) -> Decode:
        is_alone = not self._waiting and not any(row.is_reading for _, row in self._held())
        most = self.steps_alone if is_alone else self.steps_before_others
        running = [(slot, row) for slot, row in self._held() if not row.is_reading and row.remaining > 0]
        shares = tuple(Share(slot, row.request, min(most, row.remaining)) for slot, row in running)
        for share, (_, row) in zip(shares, running, strict=True):
            row.planned += share.steps
        return Decode(max(share.steps for share in shares), *self._shape(), shares)

    def _shape(self) -> tuple[int, int]:
        """The cache's room and rows for all that is planned."""
        room = self._room_of(max(map(self._extent, self._held())))
        return room, self._num_rows(room)

    def _extent(self, held: tuple[int, _Row]) -> int:
        _, row = held
        return sum(self._next_piece(row)) if row.is_reading else row.read + row.given + row.planned

    def _room_of(self, tokens: int) -> int:
        return max(self.grid, 1 << (tokens - 1).bit_length())

    def _num_rows(self, room: int) -> int:
        return min(self.num_slots, self.budget_tokens // room)

    def _end(self, slot: int, row: _Row, reason: Literal['stop', 'length', 'cancelled']) -> Ended:
        self._give_back(row)
        self._rows[slot] = None
        return Ended(row.request, reason, row.given, row.cached)

    def _give_back(self, row: _Row) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.release(row.blocks)
        row.blocks = []
