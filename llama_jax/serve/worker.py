"""The thread in which the model runs: requests come in from the web, pieces of their answers go out."""

import asyncio
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from llama_jax import runtime
from llama_jax.errors import InputError, SystemFailure
from llama_jax.inference.completion import Watch
from llama_jax.inference.constraint import Rule
from llama_jax.inference.request import CompletionRequest, Progress
from llama_jax.inference.scoring import TokenScore
from llama_jax.serve.job import Job
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.refusal import Refusal, of_input_error
from llama_jax.serve.served import Served
from llama_jax.serve.ticket import Piece, Ticket

_log = logging.getLogger(__name__)

# A loop that has not come round for so long is held by something.
_STALL_SECONDS = 8.0
# A second failure within so many seconds of the first is no accident.
_FAILURE_SECONDS = 60.0
_IDLE_SECONDS = 1.0
# An event loop that takes longer to pass on what it was told is held by something.
_LOOP_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """Rows of one prompt, which is read once.

    Attributes:
      request: of all rows.
      stop: texts that end a row.
      num_rows: drawn apart by their numbers.
    """

    request: CompletionRequest
    stop: tuple[str, ...]
    num_rows: int


@dataclasses.dataclass
class _Row:
    """That runs, or waits for a slot.

    Attributes:
      ticket: that it is of.
      place: among the ticket's rows.
      watch: makes its text.
      rule: that it keeps to.
      began: when it was asked for.
      reads_prompt: others of the same prompt take it over.
      first: when its first token came; 0 before.
      tokens: so far.
    """

    ticket: Ticket
    place: int
    watch: Watch
    rule: Rule | None
    began: float
    reads_prompt: bool
    first: float = 0.0
    tokens: list[int] = dataclasses.field(default_factory=list)


class Worker:
    """Loads the model, then answers, until it is closed, has failed twice, or once beside other processes.

    Attributes:
      served: once all is loaded and compiled; None before.
      failure: why there will be no more answers; None while there are.
    """

    def __init__(self, metrics: Metrics):
        self.served: Served | None = None
        self.failure: BaseException | None = None
        self._metrics = metrics
        self._orders: collections.deque[Callable[[], None]] = collections.deque()
        self._texts: collections.deque[tuple[Future, Sequence[int]]] = collections.deque()
        self._wakes, self._lock = threading.Event(), threading.Lock()
        self._open: dict[Ticket, int] = {}  # and how many of its rows have not ended
        self._rows: dict[int, _Row] = {}  # by the generator's number
        self._job: Job | None = None
        self._failures: collections.deque[float] = collections.deque(maxlen=2)
        self._passed_on = threading.Event()  # by the event loop: what it was told last
        self._passed_on.set()
        self._heartbeat: float | None = None
        self._is_closing = False

    def start(self, load: Callable[[], Served], on_failure: Callable[[], None] = lambda: None) -> None:
        """Begins to load; `on_failure` is called, in this thread, where no answers will come (any more)."""
        self._thread = threading.Thread(target=self._run, args=(load, on_failure), name='model', daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """Ends the thread after what it is at; whether it has ended, for which loading is not waited."""
        self._is_closing = True
        self._wakes.set()
        self._thread.join(60 if self.served else 1)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether it loads, or comes round."""
        if self.failure is not None:
            return False
        return self._heartbeat is None or time.monotonic() - self._heartbeat < _STALL_SECONDS

    @property
    def num_rows(self) -> int:
        """That run or wait."""
        with self._lock:
            return sum(self._open.values())

    def submit(self, asked: Sequence[Asked], is_streamed: bool) -> Ticket:
        """Lets rows of some prompts wait for slots; they are numbered one prompt after the other."""
        num_rows = sum(one.num_rows for one in asked)
        ticket = Ticket(
            num_rows, lambda: self._order(lambda: self._cancel(ticket)), is_streamed,
            sum(len(one.request.tokens) for one in asked),
        )  # fmt: skip
        with self._lock:
            self._open[ticket] = num_rows
        self._order(lambda: self._submit(ticket, asked))
        return ticket

    def score(self, tokens: Sequence[int]) -> 'Future[list[TokenScore]]':
        """What the model makes of a text's tokens; one text between any two dispatches."""
        future: Future[list[TokenScore]] = Future()
        self._texts.append((future, tokens))
        self._wakes.set()
        return future

    def give_up(self) -> None:
        """Ends all answers, which are told of it."""
        self._order(
            lambda: self._end(Refusal(503, 'the server has ended before the answer', code='draining'))
        )

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        self._wakes.set()

    def _run(self, load: Callable[[], Served], on_failure: Callable[[], None]) -> None:
        try:
            served = load()
            self._job = Job(served, served.warm_up())
            with runtime.hears_compilations(lambda _: self._metrics.programs.inc()):
                self.served = served
                while not self._is_closing and self.failure is None:
                    self._heartbeat = time.monotonic()
                    try:
                        self._come_round(served)
                    except Exception as error:
                        self._fail(error, served)
            if self._job is not None:
                self._job.end()
        except BaseException as error:
            self.failure = error
        self._end()
        if self.failure is not None:
            on_failure()

    def _come_round(self, served: Served) -> None:
        job = self._job
        assert job is not None
        if not (self._orders or self._texts or self._rows) and not self._wakes.wait(_IDLE_SECONDS):
            job.meet()
        self._wakes.clear()
        while self._orders:
            self._orders.popleft()()
        if self._texts:
            _score(job, *self._texts.popleft())
        self._metrics.set_rows(len(self._rows), served.num_slots)
        if self._rows:
            progresses = job.advance()
            self._metrics.tell_drafts(*job.newly_drafted())
            self._tell([self._told(one) for one in progresses if one.number in self._rows])

    def _submit(self, ticket: Ticket, asked: Sequence[Asked]) -> None:
        if ticket not in self._open:
            return  # nobody wants it any more
        assert self._job is not None and self.served is not None
        place, began = 0, time.perf_counter()
        try:
            for one in asked:
                first = None
                for stream in range(one.num_rows):
                    request = dataclasses.replace(one.request, stream=stream, like=first)
                    number, watch = self._job.submit(request, one.stop)
                    first = number if first is None else first
                    self._rows[number] = _Row(ticket, place, watch, one.request.rule, began, stream == 0)
                    place += 1
        except InputError as error:
            self._cancel(ticket)
            self._tell([(ticket, of_input_error(error))])

    def _cancel(self, ticket: Ticket) -> None:
        with self._lock:
            self._open.pop(ticket, None)
        for number in [number for number, row in self._rows.items() if row.ticket is ticket]:
            if self._job is not None:
                self._job.cancel(number)
            del self._rows[number]
            self._metrics.cancelled.inc()

    def _told(self, progress: Progress) -> tuple[Ticket, Piece | Refusal]:
        """What a row was given; one that has ended is forgotten."""
        row, now, ended = self._rows[progress.number], time.perf_counter(), progress.ended
        if not row.first:
            row.first = now
            self._metrics.first_token_seconds.observe(now - row.began)
        if row.rule is not None and row.rule.failure:
            self._cancel(row.ticket)
            return row.ticket, Refusal(
                400, f'the constraint cannot be kept: {row.rule.failure}', code='constraint'
            )
        row.tokens += progress.tokens
        row.watch.look(row.tokens)
        text = row.watch.new_text(at_end=ended is not None)
        piece = Piece(row.place, text, len(progress.tokens), progress.scores)
        if ended is None:
            return row.ticket, piece
        del self._rows[progress.number]
        with self._lock:
            self._open[row.ticket] -= 1
            if not self._open[row.ticket]:
                del self._open[row.ticket]
        cached = ended.cached_tokens if row.reads_prompt else 0
        self._metrics.tell_end(len(row.tokens), cached, now - row.first)
        return row.ticket, dataclasses.replace(piece, finish=ended.reason, cached_tokens=cached)

    def _tell(self, items: Sequence[tuple[Ticket, Piece | Refusal]]) -> None:
        """Hands over, by one call for all that the event loop has to pass on, once it has done so with the last.

        So the model is never further ahead, and what waits then waits for a client who does not read.
        """
        if not items:
            return
        self._passed_on.wait(_LOOP_SECONDS)
        self._passed_on = threading.Event()
        try:
            items[0][0].loop.call_soon_threadsafe(_put, items, self._passed_on)  # there is one loop
        except RuntimeError:  # it is closed, so nobody listens
            self._passed_on.set()
            for ticket, _ in items:
                self._cancel(ticket)

    def _fail(self, error: Exception, served: Served) -> None:
        """Something has raised: all requests get an error, and slots are made anew, unless it is the second time."""
        if not isinstance(error, SystemFailure):  # which says all in a line
            _log.error('the model failed at a step', exc_info=error)
        self._end()
        self._failures.append(time.monotonic())
        is_again = len(self._failures) == 2 and self._failures[1] - self._failures[0] < _FAILURE_SECONDS
        if is_again or isinstance(error, SystemFailure):
            self.failure, self._job = error, None
            return
        self._job = None  # before another takes as much memory
        self._job = Job(served, served.make_generator())

    def _end(self, why: Refusal | None = None) -> None:
        """All that was asked for so far gets an error."""
        with self._lock:
            tickets, self._open = list(self._open), {}
        self._rows, why = {}, why or Refusal(500, 'the model failed at this request')
        self._tell([(ticket, why) for ticket in tickets])
        while self._texts:
            future, _ = self._texts.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(why)


def _score(job: Job, future: Future, tokens: Sequence[int]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(job.score(tokens))
        except Exception as error:
            future.set_exception(error)
            if isinstance(error, SystemFailure):
                raise


def _put(items: Sequence[tuple[Ticket, Piece | Refusal]], passed_on: threading.Event) -> None:
    by_ticket: dict[Ticket, list[Piece | Refusal]] = {}
    for ticket, item in items:
        by_ticket.setdefault(ticket, []).append(item)
    for ticket, own in by_ticket.items():
        ticket.put(own)
    asyncio.get_running_loop().call_soon(passed_on.set)  # behind those who wait for what was put
