"""The loop around a step that only counts."""

import contextlib
import math
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import signals
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.signals import ENDING
from llama_jax.train.loop import LoopConfig, Measurement, _Overdue, _Timer, train
from llama_jax.train.state import TrainState
from tests.command_line import wait_for


class Saves(Checkpointer):
    """Remembers what it was asked to save, and how much of it was waited for."""

    def __init__(self):
        self.saved, self.committed = [], 0

    def save(self, step, state, metadata):
        assert int(state.step) == step
        self.saved.append((step, metadata))

    def wait(self):
        self.committed = len(self.saved)

    def raise_failure(self):
        pass


class Log:
    def __init__(self):
        self.lines, self.flushed = [], 0

    def write(self, step, values):
        self.lines.append((step, values))

    def flush(self):
        self.flushed = len(self.lines)
        return {'lines': self.flushed}

    def close(self):
        pass


def test_a_step_reads_nothing_from_the_host():
    step_fn = jax.jit(lambda state, frozen, batch, rng: (state, {'loss': batch.sum()}))
    config = LoopConfig(
        num_steps=1, batch_size=1, tokens_per_step=1, flops_per_token=(1.0, 1.0), peak_flops=1.0
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match='Disallowed host-to-device transfer'):
        train(
            TrainState(jnp.int32(0), {}, {}), config=config, step_fn=step_fn, frozen={}, rng=jax.random.key(0),
            next_batch=lambda state, step: np.ones(2, np.float32), start_step=0, schedule=lambda count: 0.0,
            checkpointer=Saves(), metadata={},
        )  # fmt: skip


def run(
    num_steps,
    *,
    step_fn=None,
    start_step=0,
    measurements=(),
    measured=None,
    saves=None,
    next_batch=None,
    prepare=lambda state, step: state,
    **intervals,
):
    def count(state, frozen, batch, rng):
        assert batch == int(state.step)  # each step has the batch of its number
        return state.replace(step=state.step + 1), {
            'loss': jnp.float32(batch + 1),
            'grad_norm': jnp.float32(1.0),
        }

    config = LoopConfig(
        num_steps=num_steps, batch_size=4, tokens_per_step=32, flops_per_token=(1e3, 2e3), peak_flops=1e9, **intervals
    )  # fmt: skip
    saves, log = saves or Saves(), Log()
    on_host = jax.transfer_guard('allow')(step_fn or count)  # these steps are not compiled
    try:
        result = train(
            TrainState(jnp.int32(start_step), {}, {}), config=config, step_fn=on_host, frozen={},
            next_batch=next_batch or (lambda state, step: step), prepare=prepare, rng=jax.random.key(0),
            start_step=start_step, schedule=lambda count: 0.1 * count, checkpointer=saves, metadata={'seed': 7},
            writers=[log], measurements=measurements, measured=measured,
        )  # fmt: skip
    except FloatingPointError as error:
        result = error
    return result, saves, log


def test_steps_are_logged_at_intervals_and_at_the_end():
    result, _, log = run(8, log_every=3)
    assert result.step == result.state.step == 8 and not result.stopped
    assert [step for step, _ in log.lines] == [3, 6, 8]
    for step, values in log.lines:
        assert values['loss'] == step
        assert values['learning_rate'] == pytest.approx(0.1 * (step - 1))
        rate = values['tokens_per_second']
        assert rate > 0 and math.isfinite(rate)
        assert values['tokens_per_second_per_device'] == pytest.approx(rate / 8)
        assert values['mfu_causal'] == pytest.approx(1e3 * rate / 8 / 1e9)
        assert values['mfu_full'] == pytest.approx(2 * values['mfu_causal'])


def validation(found, every, seen=None):
    def measure(state, step, pause):
        assert state.step == step
        if seen is not None:
            seen.append(step)
        return {'validation_loss': found * step}

    return Measurement(every, measure, ('validation_loss',))


def by_step(log, name):
    """{step: figure}; a step's figures may come in parts, in order."""
    assert [step for step, _ in log.lines] == sorted(step for step, _ in log.lines)
    return {step: values[name] for step, values in log.lines if name in values}


def test_measurements_come_at_their_interval_and_after_the_last_step():
    seen, at_end = [], []
    last = Measurement(0, lambda _, step, pause: at_end.append(step) or {})
    result, _, log = run(10, log_every=0, measurements=[validation(10.0, 4, seen), last])
    assert seen == [4, 8, 10] and at_end == [10]
    assert by_step(log, 'validation_loss') == {4: 40.0, 8: 80.0, 10: 100.0}
    assert list(by_step(log, 'loss')) == [4, 8, 10]
    assert result.figures == {'validation_loss': 100.0}


def test_a_step_is_saved_before_it_is_measured():
    saves, seen = Saves(), []

    def measure(_, step, pause):
        seen.append((step, [saved for saved, _ in saves.saved], saves.committed))
        return {}

    run(6, saves=saves, checkpoint_every=4, measurements=[Measurement(2, measure)])
    assert seen == [
        (2, [], 0),
        (4, [4], 0),
        (6, [4, 6], 2),
    ]  # the last is committed, for the rest may take hours


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize('at', [4, 10])
def test_a_measurement_that_is_cut_off_is_made_up_for(at, signum, given_back):
    """Whether within the run or after its last step, and by each signal."""
    seen = []

    def measure(_, step, pause):
        if step == at:
            os.kill(os.getpid(), signum)
            pytest.fail('the signal was not heard at once')
        return {}

    cut = Measurement(2, measure, ('score',))
    result, saves, log = run(10, checkpoint_every=4, measurements=[validation(1.0, 2), cut])
    assert result.stopped and result.step == at == saves.saved[-1][0]
    assert by_step(log, 'validation_loss')[at] == at == result.figures['validation_loss']
    assert at in by_step(log, 'loss')

    resumed, _, log = run(
        10, start_step=at, measured=dict(log.lines[-1][1]),
        measurements=[validation(1.0, 2, seen), Measurement(2, lambda _, step, pause: {'score': 5.0}, ('score',))],
    )  # fmt: skip
    assert by_step(log, 'score')[at] == 5.0 and at not in seen and not resumed.stopped
    assert resumed.figures == {'validation_loss': 10.0, 'score': 5.0}
    assert list(by_step(log, 'loss')) == ([] if at == 10 else [6, 8, 10])


def test_processes_leave_a_measurement_together_between_its_parts(given_back, monkeypatch):
    """One process alone cannot: the others would wait for its part of the next batch."""
    asked, parts = [], []

    def agreed(number):
        asked.append(number)
        return bool(parts) and number > parts[0] + 2  # where the last of them has come to

    monkeypatch.setattr(signals.multihost_utils, 'reached_preemption_sync_point', agreed)

    def measure(_, step, pause):
        if step == 4:
            monkeypatch.setattr(jax, 'process_count', lambda: 2)
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(9):
                parts.append(len(asked))
                pause()
            pytest.fail('the signal was not heard')
        return {}

    result, saves, _ = run(10, checkpoint_every=4, measurements=[Measurement(2, measure)])
    assert result.stopped and result.step == 4 == saves.saved[-1][0] and len(parts) == 3


def test_a_signal_while_the_last_step_is_saved_waits_for_it(given_back):
    class Slow(Saves):
        def wait(self):
            if not self.committed:
                os.kill(os.getpid(), signal.SIGTERM)
            super().wait()

    result, saves, log = run(3, saves=Slow(), measurements=[validation(1.0, 0)])
    assert result.stopped and result.step == 3 and saves.committed == 1 and result.figures == {}
    assert list(by_step(log, 'loss')) == [3] and not by_step(log, 'validation_loss')


def test_a_run_that_waits_for_data_is_saved(given_back):
    def next_batch(state, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return step

    result, saves, _ = run(10, next_batch=next_batch)
    assert result.stopped and result.step == 3 == saves.saved[-1][0]


def test_data_that_cannot_be_read_lose_no_step():
    def next_batch(state, step):
        assert state.step == step  # what rolls out does so with the weights as they are
        if step == 3:
            raise OSError('Input/output error')
        return step

    saves = Saves()
    with pytest.raises(OSError, match='Input/output error'):
        run(10, next_batch=next_batch, saves=saves)
    assert saves.saved[-1][0] == 3 and saves.committed


def test_what_weights_make_before_a_batch_is_no_waiting_for_data(monkeypatch):
    """And the state that it gives back goes on: the batch is made by it, and it learns."""
    seen = []

    @contextlib.contextmanager
    def waiting(timer):
        seen.append('waiting')
        yield

    def prepare(state, step):
        seen.append('prepare')
        return state.replace(params={'made': step})

    def next_batch(state, step):
        assert state.params == {'made': step}
        return step

    monkeypatch.setattr(_Timer, 'waiting', waiting)
    result, *_ = run(2, prepare=prepare, next_batch=next_batch)
    assert seen == ['prepare', 'waiting'] * 2 and result.state.params == {'made': 1}


def test_a_long_wait_is_said(caplog):
    with contextlib.closing(_Overdue(0.05)) as overdue, overdue.told('the next batch'):
        wait_for(lambda: caplog.messages)
        time.sleep(0.1)  # it is said once
    (line,) = caplog.messages
    assert line == 'waiting for the next batch for more than 0.05 s'


def test_checkpoints_come_at_their_interval_and_after_the_last_step():
    _, saves, log = run(10, log_every=1, checkpoint_every=4)
    assert saves.saved == [
        (step, {'seed': 7, 'rows_consumed': 4 * step, 'lines': step}) for step in (4, 8, 10)
    ]
    assert log.flushed == 10  # what is saved is logged before


def test_a_resumed_run_goes_on_from_its_step():
    result, saves, log = run(10, start_step=7, log_every=1)
    assert result.step == 10 and [step for step, _ in saves.saved] == [10]
    assert saves.saved[0][1]['rows_consumed'] == 3 * 4  # of this launch's steps; none were before
    assert [step for step, _ in log.lines] == [8, 9, 10]
    _, saves, log = run(3, log_every=0, checkpoint_every=0)
    assert [step for step, _ in saves.saved] == [step for step, _ in log.lines] == [3]  # the last alone
    unneeded = []  # of a measurement without figures nothing can be missing
    result, saves, _ = run(
        10, start_step=10, measurements=[Measurement(5, lambda *at: unneeded.append(at) or {})]
    )
    assert result.step == 10 and not saves.saved and not result.stopped and not unneeded


@pytest.mark.parametrize('broken', [1, 3, 4, 5, 8])
@pytest.mark.parametrize(('name', 'value'), [('loss', math.nan), ('grad_norm', math.inf)])
def test_a_figure_that_is_not_finite_stops_the_run_before_it_is_saved(broken, name, value):
    def step_fn(state, frozen, batch, rng):
        metrics = {'loss': 1.0, 'grad_norm': 1.0} | ({name: value} if batch + 1 == broken else {})
        return state.replace(step=state.step + 1), jax.tree.map(jnp.float32, metrics)

    error, saves, log = run(8, step_fn=step_fn, log_every=1, checkpoint_every=2)
    assert isinstance(error, FloatingPointError)
    before = (broken - 1) // 2 * 2
    assert f'{name} is {value} at step {broken};' in str(error)
    assert (f'checkpoint is of step {before}.' if before else 'no checkpoint was saved yet.') in str(error)
    assert [step for step, _ in saves.saved] == list(range(2, before + 1, 2))
    assert [step for step, _ in log.lines] == list(range(1, broken))


@pytest.fixture
def given_back():
    """Signals end the process after a test as they did before it."""
    handlers = {signum: signal.getsignal(signum) for signum in ENDING}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_preempted_run_saves_where_it_stands(signum, given_back):
    def step_fn(state, frozen, batch, rng):
        if batch == 4:
            os.kill(os.getpid(), signum)
        return state.replace(step=state.step + 1), {'loss': jnp.float32(1.0)}

    result, saves, _ = run(100, step_fn=step_fn, checkpoint_every=3)
    assert result.stopped and result.step == 5 == result.state.step
    assert saves.saved[-1][0] == 5 and saves.saved[-1][1]['rows_consumed'] == 20
    assert [step for step, _ in saves.saved] == [3, 5]


def test_the_signals_are_given_back():
    handlers = [signal.getsignal(signum) for signum in ENDING]
    run(2)
    assert [signal.getsignal(signum) for signum in ENDING] == handlers


def test_a_range_of_steps_is_profiled(tmp_path):
    run(4, profile=(1, 2), profile_dir=str(tmp_path))
    assert list(tmp_path.rglob('*.xplane.pb'))
