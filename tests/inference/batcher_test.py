"""Random traces through the batcher, beside a device that answers one dispatch late and remembers what it was told."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.inference.batcher import Batcher, Decode, Extend, Request
from llama_jax.inference.prefix_cache import PrefixCache

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
GRID, WIDTHS, CONTEXT = 8, (2, 4, 8), 64


def room_of(tokens, least):
    room = least
    while room < tokens:
        room *= 2
    return room


@dataclasses.dataclass
class Row:
    """Of the device."""

    request: Request
    tokens: list[int]
    given: int = 0
    planned: int = 0
    runs: bool = False
    pieces_waited: int = 0


class Trace:
    """A batcher, its device and those who ask, all of them random; each step checks what was promised."""

    def __init__(self, seed):
        rng = self.rng = np.random.default_rng(seed)
        self.prefixes = None
        if rng.random() < 0.5:
            self.prefixes = PrefixCache(
                GRID, 1, *rng.integers(0, 8, size=2).tolist(), to_host=lambda p: p, to_device=lambda p: p
            )
        widths = WIDTHS[rng.integers(3) :]
        self.batcher = Batcher(
            num_slots=int(rng.integers(1, 5)), context=CONTEXT, budget_tokens=int(rng.integers(64, 260)),
            grid=GRID, widths=widths, later_widths=widths[rng.integers(2) :: 2],
            steps=tuple(rng.integers((1, 1, 0), 7).tolist()),
            first_widths=(2 * GRID, 4 * GRID)[: 0 if self.prefixes else rng.integers(3)],
            least_room=int(rng.choice([widths[0], GRID, 2 * GRID])), prefix_cache=self.prefixes,
        )  # fmt: skip
        self.rows: dict[int, Row] = {}  # by slot, as the device has them
        self.alive: dict[int, Request] = {}
        self.ended: dict[int, str] = {}
        self.given: dict[int, int] = {}
        self.admitted: list[Request] = []
        self.results = []  # of dispatches that were not absorbed
        self.cached = 0

    def run(self, num_requests):
        submitted = 0
        while self.alive or submitted < num_requests:
            if submitted < num_requests and (not self.alive or self.rng.random() < 0.3):
                self.submit(submitted)
                submitted += 1
            if self.alive and self.rng.random() < 0.05:
                self.cancel(int(self.rng.choice(list(self.alive))))
            dispatch = self.batcher.plan()
            if dispatch is not None:
                self.results.append((dispatch, *self.execute(dispatch)))
            if len(self.results) > (dispatch is not None):
                self.absorb(*self.results.pop(0))
            else:
                assert dispatch or not self.alive, 'nothing is to be done, and requests wait'
        for result in self.results:
            self.absorb(*result)
        assert self.batcher.plan() is None
        assert sorted(self.ended) == list(range(num_requests))
        assert not self.prefixes or all(not block.users for block in self.prefixes._on_device)
        queues = {}
        for request in self.admitted:
            queues.setdefault(request.key, []).append(request.id)
        assert all(ids == sorted(ids) for ids in queues.values()), 'first come first served'

    def submit(self, id):
        length = int(self.rng.integers(1, CONTEXT))
        tokens = self.rng.integers(0, 2, size=length // GRID + 1).repeat(GRID)[:length].tolist()
        new = int(self.rng.integers(1, CONTEXT - length + 1))
        self.alive[id] = Request(id, tokens, new, key=str(self.rng.integers(3)))
        self.given[id] = 0
        self.batcher.submit(self.alive[id])

    def cancel(self, id):
        self.end(self.batcher.cancel(id), 'cancelled')
        assert self.batcher.cancel(id) is None

    def end(self, ended, reason):
        assert ended.request == self.alive.pop(ended.request.id), 'ended twice'
        assert ended.reason == reason and ended.num_tokens == self.given[ended.request.id]
        self.ended[ended.request.id] = reason

    def execute(self, dispatch):
        """What the device says later: new tokens and whether a row stopped, by slot."""
        batcher = self.batcher
        assert dispatch.room * dispatch.num_rows <= batcher.budget_tokens
        assert batcher.rooms()[dispatch.room] == dispatch.num_rows <= batcher.num_slots
        counts, stopped = {}, {}
        if isinstance(dispatch, Extend):
            self.read(dispatch)
        shares = {share.slot: share for share in dispatch.shares}
        assert len(shares) == len(dispatch.shares)
        running = {slot: row for slot, row in self.held().items() if row.runs}
        if isinstance(dispatch, Decode):
            assert dispatch.steps == max(share.steps for share in dispatch.shares) > 0
            for slot, row in running.items():
                assert slot in shares or row.planned == row.request.max_new_tokens, 'a row was left out'
                row.pieces_waited = 0
        for slot, share in shares.items():
            row = self.rows[slot]
            assert row.request == share.request and share.request.id in self.alive
            row.planned += share.steps
            assert row.planned <= row.request.max_new_tokens
            counts[slot], stopped[slot] = share.steps * row.runs, False
            if row.runs and self.rng.random() < 0.1:
                row.runs, stopped[slot], counts[slot] = False, True, int(self.rng.integers(share.steps + 1))
            row.given += counts[slot]
        for slot, row in self.held().items():
            assert slot < dispatch.num_rows
            assert len(row.request.tokens[: len(row.tokens)]) + row.planned <= dispatch.room
        return counts, stopped

    def held(self):
        """Rows of the device whose requests are not over, as far as was heard."""
        return {slot: row for slot, row in self.rows.items() if row.request.id in self.alive}

    def read(self, piece):
        request, begin = piece.request, piece.begin
        for row in self.held().values():
            row.pieces_waited += row.runs and row.planned < row.request.max_new_tokens
            assert row.pieces_waited <= 1 or not self.batcher.steps[2], 'a row waits for more than a piece'
        if piece.slot not in self.held():  # the first one
            assert begin == GRID * len(piece.blocks)
            cached = list(itertools.chain.from_iterable(block.payload for block in piece.blocks))
            assert cached == request.tokens[:begin]
            self.cached += begin
            self.rows[piece.slot] = Row(request, cached)
            self.admitted.append(request)
            held = self.held()
            longest = max(row.request.reach for row in held.values())
            assert (1 + max(held)) * room_of(longest, self.batcher.least_room) <= self.batcher.budget_tokens
        else:
            assert not piece.blocks
        row = self.rows[piece.slot]
        assert row.request == request and not row.runs and len(row.tokens) == begin
        left = len(request.tokens) - begin
        wide = [width for width in self.batcher.first_widths if not begin and width - left <= width / 8]
        most = max(wide, default=GRID)
        assert begin % GRID == 0 and len(piece.tokens) == min(left, most)
        widths = self.batcher.later_widths if begin else self.batcher.widths
        assert piece.width == min(width for width in (*widths, most) if width >= min(left, most))
        assert begin + piece.width <= piece.room
        row.tokens += piece.tokens
        row.runs = bool(piece.shares)
        assert row.runs == (row.tokens == request.tokens)
        if row.runs and self.prefixes:
            whole = zip(*[iter(request.tokens)] * GRID, strict=False)
            self.prefixes.insert(request.tokens, list(whole))

    def absorb(self, dispatch, counts, stopped):
        want = {}
        for share in dispatch.shares:
            id = share.request.id
            if id in self.alive:
                self.given[id] += counts[share.slot]
                if stopped[share.slot]:
                    want[id] = 'stop'
                elif self.given[id] == share.request.max_new_tokens:
                    want[id] = 'length'
        for ended in self.batcher.absorb(dispatch, counts, stopped):
            self.end(ended, want.pop(ended.request.id))
        assert not want


def run_traces(seeds):
    reasons, cached = set(), 0
    for seed in seeds:
        trace = Trace(seed)
        trace.run(num_requests=int(trace.rng.integers(1, 10)))
        reasons |= set(trace.ended.values())
        cached += trace.cached
    assert reasons == {'stop', 'length', 'cancelled'} and cached > len(seeds)


def test_random_traces():
    run_traces(range(40))


@pytest.mark.slow
def test_ten_thousand_random_traces():
    """In an interpreter that does not check the types of every call, which takes ten times as long."""
    code = 'from tests.inference.batcher_test import run_traces; run_traces(range(40, 10_000))'
    subprocess.run([sys.executable, '-c', code], cwd=REPOSITORY, check=True)


def make_batcher(**settings):
    given = {
        'num_slots': 4,
        'context': 64,
        'budget_tokens': 256,
        'grid': 8,
        'widths': (2, 4),
        'steps': (6, 2, 1),
    }
    return Batcher(**given | settings)


def admissions(batcher, number):
    """Requests in the order in which they get a slot; each ends with its first token."""
    found = []
    while len(found) < number:
        dispatch = batcher.plan()
        assert isinstance(dispatch, Extend) and len(dispatch.shares) == 1
        found.append(dispatch.request)
        assert [
            ended.reason for ended in batcher.absorb(dispatch, {dispatch.slot: 1}, {dispatch.slot: True})
        ] == ['stop']
    return found


def test_keys_take_turns():
    batcher = make_batcher(num_slots=1)
    for id in range(32):
        batcher.submit(Request(id, [1], 9, key='many'))
    admissions(batcher, 3)
    batcher.submit(Request(99, [1], 9, key='one'))
    order = [request.id for request in admissions(batcher, 30)]
    assert order.index(99) <= 1
    order.remove(99)
    assert order == list(range(3, 32))


def test_a_long_row_waits_until_memory_holds_it_and_nobody_overtakes_it():
    batcher = make_batcher(budget_tokens=64, steps=(1, 1, 1))  # 4 rows of 16, 2 of 32, 1 of 64
    assert batcher.rooms() == {8: 4, 16: 4, 32: 2, 64: 1}
    for id in range(3):
        batcher.submit(Request(id, [1], 15))
    first = [batcher.plan() for _ in range(6)][::2]
    assert [(piece.slot, piece.room, piece.num_rows) for piece in first] == [(0, 8, 4), (1, 8, 4), (2, 8, 4)]
    batcher.submit(Request(98, [1] * 20, 10))
    batcher.submit(Request(99, [1], 1))
    assert isinstance(batcher.plan(), Decode)
    batcher.cancel(1)
    assert isinstance(batcher.plan(), Decode)  # slot 2 is in use, which a cache of rooms for 32 does not have
    batcher.cancel(2)
    long = batcher.plan()
    assert (long.request.id, long.slot, long.room, long.num_rows) == (98, 1, 16, 4)
    assert isinstance(batcher.plan(), Decode)
    piece = batcher.plan()
    assert (piece.begin, piece.end, piece.width, piece.room, piece.num_rows) == (8, 16, 8, 32, 2)


def test_rows_of_a_mesh_divide_over_it_in_every_room():
    batcher = make_batcher(budget_tokens=100, num_slots=6, row_multiple=2)
    assert batcher.rooms() == {8: 6, 16: 6, 32: 2}
    with pytest.raises(InputError, match='takes room for 64'):
        batcher.submit(Request(0, [1] * 30, 3))


def test_a_row_that_memory_never_holds_is_refused():
    with pytest.raises(
        InputError, match='a prompt of 30 tokens with up to 3 new ones takes room for 64; memory holds 63'
    ):
        make_batcher(budget_tokens=63).submit(Request(0, [1] * 30, 3))
    with pytest.raises(InputError, match='budget_tokens is 7; rows take 8 at least, 1 of 8'):
        make_batcher(budget_tokens=7)


def test_the_memory_plan_is_one_line():
    prefixes = PrefixCache(8, 1 << 20, 1 << 30, 1 << 31, to_host=id, to_device=id)
    line = make_batcher(budget_tokens=150, prefix_cache=prefixes).memory_plan(token_bytes=1 << 20)
    assert line == (
        'rows: 4 of up to 32 tokens, 2 of up to 64 tokens; 0.12 GiB at most; '
        'beginnings of prompts: 1.00 GiB on the devices, 2.00 GiB on the host'
    )


def test_a_result_belongs_to_who_had_the_slot():
    """A slot is taken by another, or by the same once more, before a dispatch of the first is read."""
    batcher = make_batcher(num_slots=1)
    request = Request(7, [1], 4)
    batcher.submit(request)
    late = batcher.plan()
    assert batcher.cancel(7).reason == 'cancelled'
    batcher.submit(request)
    again = batcher.plan()
    assert isinstance(again, Extend)
    assert batcher.absorb(late, {0: 1}, {0: True}) == []
    assert [ended.num_tokens for ended in batcher.absorb(again, {0: 1}, {0: True})] == [1]


def test_steps_are_few_while_others_wait_and_none_where_nobody_looks_on():
    for between, want in (
        (1, ['piece', 1, 'piece', 2, 2, 6, 6]),
        (0, ['piece', 'piece', 2, 2, 2, 6, 6]),
    ):
        batcher = make_batcher(num_slots=2, steps=(6, 2, between))
        for id in range(3):
            batcher.submit(Request(id, [1], 30))
        dispatches = [batcher.plan() for _ in range(5)]
        batcher.cancel(2)
        dispatches += [batcher.plan(), batcher.plan()]
        assert [d.steps if isinstance(d, Decode) else 'piece' for d in dispatches] == want
