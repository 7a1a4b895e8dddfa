"""Who gets which slot when: requests of any length, at any time, through a fixed number of rows that decode together.

A pure state machine on the host. `submit` and `cancel` say what is wanted; `plan` says what the devices do next, a
piece of one prompt or some steps of all running rows; `absorb` hears what came of it. The devices do dispatches in the
order in which they were planned, so the next may be planned, and sent, before the last is absorbed: what is not known
yet is taken at its most, and a row that has ended meanwhile only makes its slot free a little later.

A prompt is cut by its own length and by what of it is cached, never by what else runs; all decisions follow from the
order of the calls, so every process of a job that makes the same calls decides the same.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

from llama_jax.errors import InputError
from llama_jax.inference.prefix_cache import Block, PrefixCache

Reason = Literal['stop', 'length', 'cancelled']


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
      id: its own among those that have not ended.
      tokens: of the prompt, at least one.
      max_new_tokens: at least one; with the prompt they fit into the context.
      key: whose it is; keys take turns.
      is_stepped: the host says before each of its tokens which may come, so steps are made one by one.
    """

    id: int
    tokens: Sequence[int]
    max_new_tokens: int
    key: str = ''
    is_stepped: bool = False

    @property
    def reach(self) -> int:
        """Tokens that its row may come to have."""
        return len(self.tokens) + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Share:
    """New tokens that a dispatch gives to the request that has a slot when it is planned, unless the row ends."""

    slot: int
    request: Request
    steps: int


@dataclasses.dataclass(frozen=True)
class Extend:
    """A piece of a prompt is read into a slot.

    Attributes:
      slot: to read into.
      request: of the prompt.
      blocks: cached beginning of the prompt, to put into the slot first; of a first piece alone.
      begin: tokens of the prompt before the piece, those of the blocks included; what else the slot holds is forgotten.
      end: of the piece.
      width: tokens that the program reads; those behind `end` are padding.
      room: see `Decode`.
      num_rows: see `Decode`.
      shares: the last piece of a prompt gives its first new token.
    """

    slot: int
    request: Request
    blocks: tuple[Block, ...]
    begin: int
    end: int
    width: int
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
        return bool(self.shares)


@dataclasses.dataclass(frozen=True)
class Decode:
    """Some steps of all rows that run; the others stand still.

    Attributes:
      steps: of the program; a row with a smaller share ends in it.
      room: tokens that the cache must have room for in each row: the power of two that covers all that rows with a
        request hold when this is done, and the next piece of one that is being read.
      num_rows: rows that memory holds with that room; the slots in use are among the first of them.
      shares: of the rows that run.
    """

    steps: int
    room: int
    num_rows: int
    shares: tuple[Share, ...]


@dataclasses.dataclass(frozen=True)
class Ended:
    """A request that is over: it met what ends a text, has all its tokens, or was cancelled.

    Attributes:
      request: which.
      reason: why.
      num_tokens: new ones that were absorbed.
      cached_tokens: of its prompt that were not read again.
    """

    request: Request
    reason: Reason
    num_tokens: int = 0
    cached_tokens: int = 0


@dataclasses.dataclass
class _Row:
    """A request with a slot.

    Attributes:
      request: whose row it is.
      blocks: cached beginning of its prompt, kept until all is read.
      cached: tokens in them.
      read: tokens of the prompt that are read when all that is planned is done.
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
    def unread(self) -> int:
        return len(self.request.tokens) - self.read

    @property
    def remaining(self) -> int:
        """New tokens at most that can be planned."""
        return 0 if self.unread else self.request.max_new_tokens - self.given - self.planned


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
        steps: tuple[int, int, int],
        later_widths: Sequence[int] | None = None,
        first_widths: Sequence[int] = (),
        least_room: int | None = None,
        row_multiple: int = 1,
        prefix_cache: PrefixCache | None = None,
    ):
        """Nothing waits yet.

        Args:
          num_slots: rows that are decoded together, at most.
          context: tokens that a row may have.
          budget_tokens: that memory holds, of all rows together: each takes the room of the longest.
          grid: tokens of a piece, a power of two.
          widths: that the last piece of a prompt may have besides `grid`; it gets the least that covers it.
          later_widths: the same of a last piece that is not the first; None: `widths`.
          first_widths: above `grid`, powers of two too, that a prompt may begin with: the most of which an eighth is
            padding at most.
          steps: of a dispatch at most: while nothing waits; while requests wait for a slot; between two pieces, where
            0 lets rows wait until no piece can be read, which is fastest where nobody looks on.
          least_room: of a row, a power of two; None: `grid`.
          row_multiple: rows that there are at a time are a multiple of this; so is `num_slots`.
          prefix_cache: of blocks of `grid` tokens.

        Raises:
          InputError: memory does not hold one row.
        """
        self.grid, self.widths = grid, tuple(sorted({*widths, grid}))
        self.later_widths = self.widths if later_widths is None else tuple(sorted({*later_widths, grid}))
        self.first_widths = tuple(sorted(first_widths))
        assert all(width & (width - 1) == 0 and width > grid for width in first_widths)
        assert not first_widths or prefix_cache is None
        self.least_room = max(least_room or grid, self.widths[0])
        # Then a room that covers a prompt covers the padding of its last piece too. Behind a first one it does anyway.
        for less, width in itertools.pairwise((0, *self.widths)):
            assert width & (width - 1) == 0 and width <= min(max(2 * less, self.least_room), grid)
        assert max(self.later_widths) == grid
        assert min(steps[:2]) > 0 <= steps[2]
        assert prefix_cache is None or prefix_cache.block_tokens == grid
        assert num_slots % row_multiple == 0
        self.num_slots, self.context, self.budget_tokens = num_slots, context, budget_tokens
        self.row_multiple = row_multiple
        if not self._num_rows(self.least_room):
            raise InputError(
                f'budget_tokens is {budget_tokens}; rows take {row_multiple * self.least_room} at least, '
                f'{row_multiple} of {self.least_room}'
            )
        self.steps, self.prefix_cache = steps, prefix_cache
        self._waiting: dict[str, deque[Request]] = {}  # by key, in the order of their turns
        self._rows: dict[int, _Row] = {}  # by slot
        self._read_last = False

    def submit(self, request: Request) -> None:
        """Lets a request wait for a slot.

        Raises:
          InputError: memory would not hold it even alone.
        """
        assert len(request.tokens) and request.max_new_tokens > 0 and request.reach <= self.context
        if not self._num_rows(room := self._room_of(request.reach)):
            raise InputError(
                f'a prompt of {len(request.tokens)} tokens with up to {request.max_new_tokens} new ones takes room '
                f'for {room}; memory holds {self.budget_tokens}, so shorten it or ask for fewer'
            )
        # A copy, as `absorb` knows requests by their objects: the same may be submitted again.
        self._waiting.setdefault(request.key, deque()).append(dataclasses.replace(request))

    def cancel(self, id: int) -> Ended | None:
        """Ends a request, unless it has ended; its slot is free for the next dispatch."""
        for slot, row in self._rows.items():
            if row.request.id == id:
                return self._end(slot, 'cancelled')
        for queue in self._waiting.values():
            for request in queue:
                if request.id == id:
                    self._take(request)
                    return Ended(request, 'cancelled')
        return None

    def plan(self) -> Extend | Decode | None:
        """What the devices do next; None where that takes what is not absorbed yet, or another request."""
        runs = any(row.remaining for row in self._rows.values())
        slot = self._slot_to_read()
        if slot is not None and not (runs and self._read_last and self.steps[2]):
            self._read_last = True
            return self._extend(slot)
        self._read_last = False
        if not runs:
            return None
        return self._decode(self.steps[2] if slot is not None else self.steps[bool(self._waiting)])

    def absorb(
        self,
        dispatch: Extend | Decode,
        counts: Mapping[int, int] | Sequence[int],
        stopped: Mapping[int, bool] | Sequence[bool],
    ) -> list[Ended]:
        """Hears what came of a dispatch, in the order of planning; says which requests have ended by it.

        Args:
          dispatch: as planned.
          counts: new tokens of each slot that has a share.
          stopped: whether each such slot met what ends a text, in the last of them.
        """
        ended = []
        for share in dispatch.shares:
            slot, row = share.slot, self._rows.get(share.slot)
            if row is None or row.request is not share.request:
                continue  # cancelled, or ended in a dispatch before
            assert 0 <= counts[slot] <= share.steps
            row.planned -= share.steps
            row.given += int(counts[slot])
            if isinstance(dispatch, Extend):
                self._give_back(row)
            if stopped[slot] or row.given == row.request.max_new_tokens:
                ended.append(self._end(slot, 'stop' if stopped[slot] else 'length'))
        return ended

    def rooms(self) -> dict[int, int]:
        """{room: rows that memory holds with it}, of all shapes that the cache can have."""
        largest = min(
            self._room_of(self.context), 1 << ((self.budget_tokens // self.row_multiple).bit_length() - 1)
        )
        rooms = [1 << power for power in range(self.least_room.bit_length() - 1, largest.bit_length())]
        return {room: self._num_rows(room) for room in rooms}

    def memory_plan(self, token_bytes: int) -> str:
        """One line on what is held where, for the log; a token's keys and values take so many bytes in all layers."""
        most = max(room * num_rows for room, num_rows in self.rooms().items()) * token_bytes
        longest = {num_rows: min(room, self.context) for room, num_rows in self.rooms().items()}
        rows = ', '.join(f'{num_rows} of up to {room:,} tokens' for num_rows, room in longest.items())
        line = f'rows: {rows}; {most / 2**30:.2f} GiB at most'
        return f'{line}; {self.prefix_cache.memory_plan()}' if self.prefix_cache else line

    def _slot_to_read(self) -> int | None:
        """Of the prompt that is being read, else of the next one, if there is room for it."""
        reading = [slot for slot, row in self._rows.items() if row.unread]
        return reading[0] if reading else self._admit()

    def _admit(self) -> int | None:
        """Gives the next request a slot. Where it must wait for memory nobody overtakes it, lest it wait for ever."""
        slot = next((slot for slot in range(self.num_slots) if slot not in self._rows), None)
        if slot is None or not self._waiting:
            return None
        request = next(iter(self._waiting.values()))[0]
        longest = max(request.reach, *(row.request.reach for row in self._rows.values()), 0)
        if max(slot, *self._rows, 0) >= self._num_rows(self._room_of(longest)):
            return None
        self._take(request)
        if request.key in self._waiting:
            self._waiting[request.key] = self._waiting.pop(request.key)  # behind the others
        blocks = self.prefix_cache.match(request.tokens) if self.prefix_cache else []
        cached = len(blocks) * self.grid
        self._rows[slot] = _Row(request, blocks, cached, cached)
        return slot

    def _take(self, request: Request) -> None:
        """Out of those that wait."""
        queue = self._waiting[request.key]
        queue.remove(request)
        if not queue:
            del self._waiting[request.key]

    def _extend(self, slot: int) -> Extend:
        row = self._rows[slot]
        begin, width = row.read, self._next_width(row)
        row.read += min(width, row.unread)
        row.planned = int(not row.unread)
        shares = (Share(slot, row.request, 1),) * row.planned
        blocks = tuple(row.blocks) if begin == row.cached else ()
        return Extend(slot, row.request, blocks, begin, row.read, width, *self._shape(), shares)

    def _next_width(self, row: _Row) -> int:
        widths = self.later_widths if row.read else self.widths
        if not row.read and (wide := [width for width in self.first_widths if 8 * row.unread >= 7 * width]):
            return wide[-1]
        return next((width for width in widths if width >= row.unread), self.grid)

    def _decode(self, most: int) -> Decode:
        shares = []
        if any(row.remaining and row.request.is_stepped for row in self._rows.values()):
            most = 1
        for slot, row in self._rows.items():
            if steps := min(row.remaining, most):
                shares.append(Share(slot, row.request, steps))
                row.planned += steps
        return Decode(max(share.steps for share in shares), *self._shape(), tuple(shares))

    def _shape(self) -> tuple[int, int]:
        """The cache's room and rows for all that is planned."""
        held = [
            row.read + (self._next_width(row) if row.unread else row.given + row.planned)
            for row in self._rows.values()
        ]
        room = self._room_of(max(held))
        return room, self._num_rows(room)

    def _room_of(self, tokens: int) -> int:
        return max(self.least_room, 1 << (tokens - 1).bit_length())

    def _num_rows(self, room: int) -> int:
        rows = min(self.num_slots, self.budget_tokens // room)
        return rows - rows % self.row_multiple

    def _end(self, slot: int, reason: Reason) -> Ended:
        row = self._rows.pop(slot)
        self._give_back(row)
        return Ended(row.request, reason, row.given, row.cached)

    def _give_back(self, row: _Row) -> None:
        if self.prefix_cache:
            self.prefix_cache.release(row.blocks)
        row.blocks = []
