"""Completes any number of prompts, at any time, with one model: what the batcher plans, by the programs of `decoding`.

    generator = Generator(model, params, num_slots=8)
    number = generator.submit(CompletionRequest([1, 306], max_new_tokens=16, stop_ids=(2,)))
    for progress in generator.run():
        print(progress.number, progress.tokens, progress.ended)

Every process of a job makes the same calls and gets the same answers.
"""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from llama_jax import runtime
from llama_jax.errors import InputError
from llama_jax.inference import decoding
from llama_jax.inference.batcher import Batcher, Decode, Extend, Request
from llama_jax.inference.logits_processor import Follower, LogitsProcessor, RuledProcessor
from llama_jax.inference.prefix_cache import PrefixCache
from llama_jax.inference.prompts import check_prompts
from llama_jax.inference.proposers import Proposer
from llama_jax.inference.request import CompletionRequest, Progress, check_number
from llama_jax.inference.scoring import MAX_CANDIDATES, TokenScore
from llama_jax.inference.slots import Begun, Hidden, Piece, Slots
from llama_jax.inference.speculative import SpeculativeSlots
from llama_jax.inference.steps import Steps
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.ops.attention import platform_of
from llama_jax.types import Params

_log = logging.getLogger(__name__)

# Tokens of a piece of a prompt, and what its last may be cut to: few widths, so few programs. A CPU, to which a token
# of padding is as much work as any other, has shorter ones; other devices are kept busy by long pieces alone.
_WIDTHS = {'cpu': (8, 16, 32, 64, 128, 256)}
_ACCELERATORS_WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)
# The last of several pieces may be padded to fewer, as beside the others that is little; on accelerators to any.
_LATER_WIDTHS = {'cpu': (32, 128)}
# Wider ones that a prompt begins with, where nobody looks on: more rows at a time are less work for each.
_FIRST_WIDTHS = {'cpu': (512, 1024)}
# Tokens of a piece where beginnings of prompts are kept, in blocks of that many.
_BLOCK = 256
# Tokens of a piece of several prompts, where nobody looks on: as many as keep a device busy.
_TOGETHER = {'cpu': 128}
_ACCELERATORS_TOGETHER = 2048
# Decode steps between two looks at what waits.
_STEPS_BEFORE_OTHERS = 8


@dataclasses.dataclass
class _Open:
    """A request that goes on.

    Attributes:
      asked: for what.
      follower: says which of its tokens may come; None: any.
      made: its tokens so far.
    """

    asked: CompletionRequest
    follower: Follower | None
    made: list[int] = dataclasses.field(default_factory=list)

    def take(self, new: list[int]) -> tuple[list[int], int | None, bool]:
        """Of new tokens those that it keeps, the stop token that ends it, and whether it is over."""
        for index, token in enumerate(new):
            if token in self.asked.stop_ids:
                return new[:index], token, True
            self.made.append(token)
            if self.follower is not None:
                self.follower.hear(token)
            if self.asked.is_complete is not None and self.asked.is_complete(self.made):
                return new[: index + 1], None, True
        return new, None, False


class Generator:
    """Slots on the devices, and requests that share them."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        params: Params,
        *,
        num_slots: int,
        budget_tokens: int | None = None,
        max_steps: int = decoding.COLUMNS,
        is_watched: bool = True,
        reads_together: bool = True,
        log_probabilities: int | None = None,
        processor: LogitsProcessor | None = None,
        prefix_bytes: tuple[int, int] = (0, 0),
        draft: Proposer | None = None,
        widths: Sequence[int] = (),
    ):
        """Nothing runs yet.

        Args:
          model: the architecture and its compute dtype; its partitioner, where it has one, places the rows.
          params: its weights; see `decode_weights`.
          num_slots: rows that are decoded together.
          budget_tokens: that the cache may hold, of all rows together; None: as many as all slots could come to have.
          max_steps: tokens that a row is given before they are looked at.
          is_watched: rows go on between any two pieces of prompts, each of which is read by itself, and may have any
            settings without another program; else rows go on once no more can be read.
          reads_together: where nobody watches, short prompts are read together: faster, but last bits may depend on the
            company.
          log_probabilities: each token is scored, and so many of the most likely ones at its place; None: none is.
          processor: changes the logits of all rows.
          prefix_bytes: for beginnings of prompts that are read once, on the devices and on the host; 0 keeps none.
          draft: proposes tokens, of which the model verifies several at once.
          widths: tokens of a piece of a prompt, the most and what its last may be cut to, all powers of two; (): those
            that suit the devices.

        Raises:
          InputError: the budget does not hold one row, a number is out of range, or the draft does not fit.
        """
        num_candidates = min(MAX_CANDIDATES, model.config.vocab_size) if log_probabilities else 0
        options = model, params, num_candidates, processor, is_watched
        self._slots = Slots(*options) if draft is None else SpeculativeSlots(draft, *options)
        self._config, self._log_probabilities = model.config, log_probabilities
        context, platform = model.config.max_seq_len, platform_of(model.partitioner)
        # On a CPU the host's work and the device's take the same cores, so nothing is won by planning ahead. Beside a
        # draft it must be known how far rows have come.
        self._is_ahead = platform != 'cpu' and draft is None
        at_once = 1 if draft is None else draft.num_tokens + 1  # which is given whole, or not at all
        max_steps, others = (max(at_once, min(max_steps, n)) for n in (max_steps, _STEPS_BEFORE_OTHERS))
        longest = decoding.power_of_two(context)
        first_widths = ()
        if not widths:
            if not is_watched and not any(prefix_bytes):
                first_widths = [width for width in _FIRST_WIDTHS.get(platform, ()) if width <= longest]
            widths = _WIDTHS.get(platform, _ACCELERATORS_WIDTHS)
            widths = [*(w for w in widths if w < _BLOCK), _BLOCK] if any(prefix_bytes) else widths
        widths = sorted({min(width, longest) for width in widths})
        grid, num_slots = max(widths), decoding.rows_of(num_slots, model.partitioner)
        later = [width for width in widths if width in _LATER_WIDTHS.get(platform, widths) or width == grid]
        together = _TOGETHER.get(platform, _ACCELERATORS_TOGETHER)
        if is_watched or not reads_together or any(prefix_bytes):
            together = 1
        self._at_once = {
            width: max(1, min(num_slots, together // width)) for width in (*widths, *first_widths)
        }
        self._prefixes = self._prefix_cache(grid, *prefix_bytes) if any(prefix_bytes) else None
        self.batcher = Batcher(
            num_slots=num_slots, context=context, budget_tokens=budget_tokens or num_slots * longest, grid=grid,
            widths=widths, later_widths=later, first_widths=first_widths, least_room=min(decoding.LEAST_ROOM, longest),
            steps=(max_steps, others, at_once if is_watched else 0), prefix_cache=self._prefixes,
            row_multiple=decoding.rows_of(1, model.partitioner),
        )  # fmt: skip
        self._processor = processor
        self._open: dict[int, _Open] = {}  # by the number of a request
        self._num_asked = 0
        self._planned: collections.deque[Extend | Decode] = collections.deque()  # not yet sent
        self._pending: collections.deque[tuple[Sequence[Extend | Decode], Steps | None]]
        self._pending = collections.deque()
        self._blocks: list[Any] = []  # of the prompt that is being read
        # By the number of a request: those like it that have not begun, and what they take over of its prompt.
        self._like: dict[int, set[int]] = {}
        self._read_prompts: dict[int, tuple[Any, Hidden]] = {}
        _log.debug('%s', self.batcher.memory_plan(self._slots.token_bytes))

    def submit(self, asked: CompletionRequest) -> int:
        """Lets a request wait for a slot.

        Returns:
          Its number.

        Raises:
          InputError: its prompt does not fit, or a setting does not.
        """
        check_prompts([asked.tokens], self._config)
        check_number('max_new_tokens', most := asked.max_new_tokens)
        if (least := asked.sampler.min_new_tokens) > most:
            raise InputError(f'min_new_tokens is {least}; it must be at most max_new_tokens, {most}')
        self._slots.expect(asked)
        follower = self._processor.follow(asked.rule) if isinstance(self._processor, RuledProcessor) else None
        wanted = min(asked.max_new_tokens, self._config.max_seq_len - len(asked.tokens))
        number = self._num_asked
        self.batcher.submit(Request(number, asked.tokens, wanted, asked.key, follower is not None))
        self._open[number] = _Open(asked, follower)
        self._num_asked += 1
        if asked.like is not None:
            self._like.setdefault(asked.like, set()).add(number)
        return number

    @property
    def drafted(self) -> tuple[int, int]:
        """Tokens that the draft proposed so far, and of them those that were taken."""
        return self._slots.drafted

    def cancel(self, number: int) -> Progress | None:
        """Ends a request, if it has not ended; its slot is free from the next dispatch on."""
        ended = self.batcher.cancel(number)
        if ended is None:
            return None
        self._forget(number)
        return Progress(number, [], ended=ended)

    def run(self) -> Iterator[Progress]:
        """Until all requests have ended, also those that are submitted meanwhile."""
        while self._open:
            yield from self.advance()

    def advance(self) -> list[Progress]:
        """Sends the next to the devices, and tells what came of the one before, on a CPU of this one."""
        sent, progress = self._next(), []
        while self._pending and self._follows():  # which token may come next is known when the last is
            progress += self._absorb(*self._pending.popleft())
        if sent:
            self._pending.append((sent, self._send(sent)))
        if len(self._pending) > (self._is_ahead and bool(sent)):
            progress += self._absorb(*self._pending.popleft())
        return progress

    def _follows(self) -> bool:
        """Whether a request has somebody who says which of its tokens may come."""
        has_rules = isinstance(self._processor, RuledProcessor)
        return has_rules and any(one.follower is not None for one in self._open.values())

    def _next(self) -> list[Extend | Decode]:
        """One dispatch, or pieces of as many prompts as are read at once; what else had to be planned waits."""
        if not self._planned and (dispatch := self.batcher.plan()) is not None:
            self._planned.append(dispatch)
        if not self._planned:
            return []
        leader = self._planned[0]
        if not isinstance(leader, Extend) or not self._is_alone(leader):
            return [self._planned.popleft()]
        number = self._at_once[leader.width]
        for index in range(1, number):
            if index == len(self._planned):
                if (dispatch := self.batcher.plan()) is None:
                    return [self._planned.popleft()]
                self._planned.append(dispatch)
            other = self._planned[index]
            if not isinstance(other, Extend) or not self._is_alone(other) or _shape(other) != _shape(leader):
                return [self._planned.popleft()]
        return [self._planned.popleft() for _ in range(number)]

    def _is_alone(self, piece: Extend) -> bool:
        """Whether its request goes on, and has its prompt for itself."""
        one = self._open.get(piece.request.id)
        return one is not None and piece.request.id not in self._like and one.asked.like is None

    def _send(self, sent: Sequence[Extend | Decode]) -> Steps | None:
        largest = max(sent, key=lambda dispatch: dispatch.room)
        self._slots.fit(largest.num_rows, largest.room)
        if isinstance(sent[0], Decode):
            running = {share.slot: self._open.get(share.request.id) for share in sent[0].shares}
            followers = {
                slot: one.follower for slot, one in running.items() if one and one.follower is not None
            }
            return self._slots.decode(list(running), sent[0].steps, followers)
        return self._extend([piece for piece in sent if isinstance(piece, Extend)])

    def _extend(self, pieces: Sequence[Extend]) -> Steps | None:
        """Pieces of prompts read, and the first tokens drawn if they are the last."""
        if any(piece.request.id not in self._open for piece in pieces):
            return None  # cancelled since it was planned, which then is the only one
        grid, piece, number = self.batcher.grid, pieces[0], pieces[0].request.id
        asked = self._open[number].asked
        if asked.like is not None and (known := self._read_prompts.get(asked.like)) is not None:
            block, last = known
            self._slots.put(piece.slot, 0, block, len(piece.request.tokens))
        else:
            for index, block in enumerate(piece.blocks):
                self._slots.put(piece.slot, index * grid, block.payload, (index + 1) * grid)
            last = self._slots.read([Piece(one.slot, one.begin, one.tokens) for one in pieces], piece.width)
            self._keep_block(piece)
        if not piece.is_last:
            return None
        if number in self._like:
            width = min(piece.room, max(self.batcher.least_room, decoding.power_of_two(piece.end)))
            self._read_prompts[number] = self._slots.copy(piece.slot, 0, width), last
        begun = []
        for piece in pieces:
            one = self._open[piece.request.id]
            begun.append(Begun(piece.slot, one.asked, piece.request.max_new_tokens, one.follower))
            self._has_begun(piece.request.id)
        return self._slots.first(last, begun)

    def _keep_block(self, piece: Extend) -> None:
        """Whole blocks of a prompt go to the prefix cache once all of it is read."""
        if self._prefixes is None:
            return
        grid, tokens = self.batcher.grid, piece.request.tokens
        if piece.begin == len(piece.blocks) * grid:
            self._blocks = []
        if len(piece.tokens) == grid:
            self._blocks.append(self._slots.copy(piece.slot, piece.begin, grid))
        if piece.is_last:
            self._prefixes.insert(tokens, self._blocks, len(tokens) // grid - len(self._blocks))

    def _absorb(self, sent: Sequence[Extend | Decode], steps: Steps | None) -> list[Progress]:
        """What came of what was sent; it waits for the devices."""
        found, progress = None if steps is None else jax.device_get(steps), []
        for place, dispatch in enumerate(sent):
            counts, stopped, made = {}, {}, {}
            for share in dispatch.shares:
                number = share.request.id
                if (one := self._open.get(number)) is None:  # cancelled, or ended in a dispatch before
                    continue
                row = share.slot if isinstance(dispatch, Decode) else place
                assert found is not None
                tokens, stop_id, is_over = one.take(found.tokens[row, : found.count[row]].tolist())
                scores = self._scores(found, row, tokens if stop_id is None else [*tokens, stop_id])
                counts[share.slot], stopped[share.slot] = len(tokens), is_over
                made[number] = Progress(number, tokens, stop_id, scores)
            ended = {one.request.id: one for one in self.batcher.absorb(dispatch, counts, stopped)}
            for number in ended:
                self._forget(number)
            if ended and not self._open and isinstance(self._slots, SpeculativeSlots):
                _log.info('%s', self._slots.describe())
            progress += [dataclasses.replace(of, ended=ended.get(number)) for number, of in made.items()]
        return progress

    def _scores(self, found: Steps, row: int, tokens: list[int]) -> list[TokenScore]:
        """Of the first tokens that a row was given."""
        if (most := self._log_probabilities) is None:
            return []
        values, filtered = (
            x[row, : len(tokens)].tolist() for x in (found.log_probability, found.filtered_log_probability)
        )
        likely = [[] for _ in tokens]
        if found.candidates is not None:
            ids, of_ids = (x[row, : len(tokens), :most].tolist() for x in found.candidates)
            likely = [list(zip(*one, strict=True)) for one in zip(ids, of_ids, strict=True)]
        columns = zip(tokens, values, likely, filtered, strict=True)
        return [TokenScore.create(*column) for column in columns]

    def _forget(self, number: int) -> None:
        """A request that is over."""
        self._has_begun(number)
        del self._open[number]

    def _has_begun(self, number: int) -> None:
        """The prompt of the request that it is like is kept until all of these have begun."""
        like = self._open[number].asked.like
        if like in self._like:
            self._like[like].discard(number)
            if not self._like[like]:
                del self._like[like]
                self._read_prompts.pop(like, None)

    def _prefix_cache(self, grid: int, device_bytes: int, host_bytes: int) -> PrefixCache:
        if host_bytes and jax.process_count() > 1:
            raise InputError(
                'beginnings of prompts are kept on the host of one process alone; ask for 0 bytes'
            )
        block_bytes = grid * self._slots.token_bytes
        return PrefixCache(grid, block_bytes, device_bytes, host_bytes, jax.device_get, self._slots.to_device)

    def warm_up(self, also: Sequence[Callable[[], object]] = ()) -> None:
        """Compiles every program that requests can need, before the first of them; none is compiled after.

        Args:
          also: what else compiles programs of the model.
        """
        assert not self._open
        began, batcher, seconds_each = time.perf_counter(), self.batcher, []
        with runtime.hears_compilations(seconds_each.append):
            later = {width: self._at_once[width] for width in batcher.later_widths}
            self._slots.compile(batcher.rooms(), self._at_once, later, batcher.grid, also)
        memory, seconds = batcher.memory_plan(self._slots.token_bytes), time.perf_counter() - began
        _log.info('%d programs compiled in %.1f s; %s', len(seconds_each), seconds, memory)


def _shape(piece: Extend) -> tuple[int, bool, bool]:
    """What pieces that are read together have in common."""
    return piece.width, piece.begin == 0, piece.is_last
