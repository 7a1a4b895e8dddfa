"""The training loop: launch a step, and while it runs look at the one before. Save first, then measure."""

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from llama_jax.checkpoint.training import Checkpointer
from llama_jax.runtime import is_main_process
from llama_jax.signals import Interrupted, PreemptionSignal
from llama_jax.train.metrics import Writer
from llama_jax.train.state import TrainState
from llama_jax.types import Array, Metrics, PyTree

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is found out about the weights now and then, beside training.

    Attributes:
      every: after so many updates (0: never), and after the last.
      measure: (state after `step` updates, step, pause) -> figures to log with that step. Between its parts it calls
        `pause()`, on all processes equally often: a signal that has come ends it there.
      figures: names of what it finds; none of them logged with the step that a run resumes at: it is made up for then.
    """

    every: int
    measure: Callable[[TrainState, int, Callable[[], None]], dict[str, float]]
    figures: tuple[str, ...] = ()


class Ended(Exception):
    """Raised by what makes batches: the run has learnt what it is to learn, and ends before `num_steps`."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """How training ended.

    Attributes:
      state: the last.
      step: updates that it has had.
      figures: what was measured of it.
      stopped: by a signal, before all was trained and measured; the same again goes on from here.
    """

    state: TrainState
    step: int
    figures: dict[str, float]
    stopped: bool


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long and how often.

    Attributes:
      num_steps: updates after which training ends.
      batch_size: rows in a step, for the count of rows consumed.
      tokens_per_step: of a global batch, for the rates.
      flops_per_token: (causal, full), of one token's training.
      peak_flops: of one device.
      log_every: steps between logged steps; 0: the last only.
      checkpoint_every: steps between checkpoints; 0: the last only, which is always one.
      profile: (first step, number of steps) to trace; (0, 0) traces none.
      profile_dir: where the trace goes.
    """

    num_steps: int
    batch_size: int
    tokens_per_step: int
    flops_per_token: tuple[float, float]
    peak_flops: float
    log_every: int = 10
    checkpoint_every: int = 1000
    profile: tuple[int, int] = (0, 0)
    profile_dir: str = ''


def train(
    state: TrainState,
    *,
    config: LoopConfig,
    step_fn: Callable[[TrainState, PyTree, PyTree, Array], tuple[TrainState, Metrics]],
    frozen: PyTree,
    next_batch: Callable[[TrainState, int], PyTree],
    prepare: Callable[[TrainState, int], TrainState] = lambda state, step: state,
    rng: Array,
    start_step: int,
    rows_before: int = 0,
    schedule: Callable[[int], Any],
    checkpointer: Checkpointer,
    metadata: dict[str, Any],
    writers: Sequence[Writer] = (),
    measurements: Sequence[Measurement] = (),
    measured: Mapping[str, float] | None = None,
    described: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> Trained:
    """Runs until `num_steps`, or until a signal to end has been answered with a checkpoint.

    A step's checkpoint is written before anything is measured of it, and the last one's is committed by then: whatever
    ends the process in a long measurement, training is not lost, and what is missing is measured on resuming.

    Args:
      state: at `start_step`; donated.
      config: lengths and intervals.
      step_fn: from `step.compile_train_step`.
      frozen: passed through to the loss.
      next_batch: (state, updates done) -> the global batch of the next one; batches of data ignore the state.
      prepare: (state, updates done) -> the state that goes on; what is done by the weights before the next batch is
        there, as drawing what it is made of. That is no waiting for data.
      rng: the run's key.
      start_step: updates already done.
      rows_before: rows that they consumed.
      schedule: update count -> learning rate, for the log.
      checkpointer: saves state with the rows consumed.
      metadata: saved with every checkpoint.
      writers: take each logged step, on process 0; what is measured of it comes after.
      measurements: made when they are due, in this order.
      measured: what is logged of `start_step`, the same on all processes.
      described: step -> what else is logged of it.

    Raises:
      FloatingPointError: a metric is not finite; the message names it and the step. Nothing later than the last
        checkpoint is saved.
    """
    preemption = PreemptionSignal()
    timer = _Timer(config)
    # Without a terminal a bar would be one endless line: there each logged step is a line of the log.
    bar = tqdm.tqdm(
        total=config.num_steps, initial=start_step, unit='step', disable=None if is_main_process() else True
    )
    done = saved = start_step
    figures: dict[str, float] = {}

    def write(step: int, values: dict[str, float]) -> None:
        for writer in writers if is_main_process() else ():
            writer.write(step, values)

    def report(step: int, metrics: Metrics, measuring: bool) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                last = f'the last checkpoint is of step {saved}' if saved else 'no checkpoint was saved yet'
                raise FloatingPointError(
                    f'{name} is {value} at step {step}; {last}. Look at the data of '
                    'this step, or start anew with a lower learning rate'
                )
        logged = measuring or _is_due(step, config.log_every) or step == config.num_steps
        if not logged and step > start_step + 1:
            return
        rates = timer.rates(step)  # also after the first step, which compiles: the next rates are without it
        line = f'loss {values["loss"]:.3f}, {rates["tokens_per_second"]:,.0f} tok/s'
        bar.set_postfix_str(line)
        if logged and bar.disable:
            logger.info('step %d: %s', step, line)
        if logged:
            write(step, values | {'learning_rate': float(schedule(step - 1)), **rates, **described(step)})

    def save() -> None:
        nonlocal saved
        # The figures of every saved step must survive a kill: resuming keeps them, and computes only later ones.
        kept = {'rows_consumed': rows_before + (done - start_step) * config.batch_size}
        for writer in writers if is_main_process() else ():
            kept |= writer.flush()
        checkpointer.save(done, state, metadata | kept)
        saved = done

    def due() -> list[Measurement]:
        last = done == config.num_steps
        return [item for item in measurements if last or _is_due(done, item.every)]

    def measure(items: Sequence[Measurement]) -> None:
        preemption.listen()
        for item in items:
            with timer.paused(), preemption.interruptible():
                found = item.measure(state, done, preemption.raise_received)
            figures.update(found)
            if found:
                write(done, found)

    def fetch() -> PyTree:
        nonlocal state
        try:
            with preemption.interruptible():
                state = prepare(state, done)
            with overdue.told('the next batch'), preemption.interruptible(), timer.waiting():
                return next_batch(state, done)
        except Exception:  # data that cannot be read: what was trained before is good
            if jax.process_count() == 1:  # saving takes all processes, and the others do not know
                finish()
            raise

    def finish() -> None:
        nonlocal pending
        if pending:
            report(*pending, measuring=False)
            pending = None
        if done > saved:
            save()

    # The loop reads one step behind: fetching a metric waits for its step, and the devices must not wait for us.
    pending: tuple[int, Metrics] | None = None
    stopped = False
    with (
        contextlib.closing(preemption),
        contextlib.ExitStack() as at_exit,
        contextlib.closing(_Profiler(config)) as profiler,
        contextlib.closing(_Overdue()) as overdue,
        bar,
    ):
        at_exit.callback(checkpointer.wait)  # after an error too: what Python's end cuts off is lost
        try:
            if start_step:
                known = measured or {}
                figures.update(
                    {name: known[name] for item in measurements for name in item.figures if name in known}
                )
                measure([item for item in due() if item.figures and not figures.keys() & set(item.figures)])
            while done < config.num_steps:
                profiler.before_step(done)
                batch = fetch()
                # Whatever a step reads is on the devices: a batch on the host would be copied while they wait.
                annotation = jax.profiler.StepTraceAnnotation('train', step_num=done)
                timer.count(done + 1, batch)
                with annotation, jax.transfer_guard('disallow'):
                    state, metrics = step_fn(state, frozen, batch, rng)
                preemption.listen()  # now there is something to save; while the first step compiled there was not
                done += 1
                figures.clear()
                bar.update()
                if pending:
                    report(*pending, measuring=False)
                checkpointer.raise_failure()
                pending = (done, metrics)
                last, items = done == config.num_steps, due()
                save_due = last or _is_due(done, config.checkpoint_every)
                if items or save_due:
                    jax.block_until_ready(metrics)
                    report(*pending, measuring=bool(items))
                    pending = None
                if save_due:
                    with timer.paused():
                        save()
                        if last:
                            with overdue.told(f'the checkpoint of step {done}'):
                                checkpointer.wait()
                measure(items)
            stopped = preemption.received()
        except Interrupted:
            stopped = True
        except Ended as ended:
            logger.info('step %d: %s', done, ended)
        finish()
    return Trained(state, done, figures, stopped)


def _is_due(step: int, every: int) -> bool:
    """Whether `step` is one of every so many; 0 makes none due."""
    return every > 0 and step % every == 0


class _Overdue:
    """A thread that says what the run waits for, where it waits long: nothing else would tell of a disk that hangs."""

    def __init__(self, patience: float = 10.0):
        self._patience = patience
        self._waiting: tuple[str, float] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name='overdue').start()

    def _watch(self) -> None:
        said = None
        while not self._closed.wait(self._patience / 10):
            waiting = self._waiting
            if waiting and waiting is not said and time.monotonic() - waiting[1] > self._patience:
                said = waiting
                logger.warning('waiting for %s for more than %g s', waiting[0], self._patience)

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Around what should not take long."""
        self._waiting = what, time.monotonic()
        try:
            yield
        finally:
            self._waiting = None

    def close(self) -> None:
        self._closed.set()


class _Profiler:
    """The profiler's trace of a range of steps."""

    def __init__(self, config: LoopConfig):
        self._first, self._count = config.profile
        self._directory = config.profile_dir
        self._running = False

    def before_step(self, done: int) -> None:
        if self._count and done == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif self._running and done == self._first + self._count:
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class _Timer:
    """Rates between logged steps, without the time that evaluation, sampling and saving took."""

    def __init__(self, config: LoopConfig):
        self._config = config
        self._rows: dict[int, int] = {}  # by step, of those that no rates were asked for yet
        self._mark = time.perf_counter()
        self._paused = self._waited = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count(self, step: int, batch: PyTree) -> None:
        """The batch of a step; most have `batch_size` rows."""
        shapes = map(np.shape, jax.tree.leaves(batch))
        self._rows[step] = next((shape[0] for shape in shapes if shape), self._config.batch_size)

    def rates(self, step: int) -> dict[str, float]:
        """Tokens per second, utilisations and the share of time that batches were waited for, since the last call."""
        now = time.perf_counter()
        seconds = now - self._mark - self._paused
        rows = sum(self._rows.pop(one) for one in list(self._rows) if one <= step)
        tokens = self._config.tokens_per_step * rows / self._config.batch_size
        per_second = tokens / max(seconds, 1e-9)
        per_device = per_second / jax.device_count()
        waited = min(self._waited / max(seconds, 1e-9), 1.0)
        self._mark, self._paused, self._waited = now, 0.0, 0.0
        causal, full = (
            flops * per_device / self._config.peak_flops for flops in self._config.flops_per_token
        )
        return {
            'tokens_per_second': per_second,
            'tokens_per_second_per_device': per_device,
            'mfu_causal': causal,
            'mfu_full': full,
            'data_wait': waited,
        }
