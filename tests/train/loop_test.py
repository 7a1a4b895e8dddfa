"""The loop around a step that only counts."""

import itertools
import math
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from llama_jax.checkpoint.training import Checkpointer
from llama_jax.train.loop import LoopConfig, train
from llama_jax.train.state import TrainState


class Saves(Checkpointer):
    """Remembers what it was asked to save."""

    def __init__(self):
        self.saved = []

    def save(self, step, state, metadata):
        assert int(state.step) == step
        self.saved.append((step, metadata))

    def wait(self):
        pass

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


def run(num_steps, *, step_fn=None, start_step=0, callbacks=(), **intervals):
    def count(state, frozen, batch, rng):
        assert batch == int(state.step)  # each step has the batch of its number
        return state.replace(step=state.step + 1), {
            'loss': jnp.float32(batch + 1),
            'grad_norm': jnp.float32(1.0),
        }

    config = LoopConfig(
        num_steps=num_steps, batch_size=4, tokens_per_step=32, flops_per_token=(1e3, 2e3), peak_flops=1e9, **intervals
    )  # fmt: skip
    saves, log = Saves(), Log()
    try:
        result = train(
            TrainState(jnp.int32(start_step), {}, {}), config=config, step_fn=step_fn or count, frozen={},
            batches=itertools.count(start_step), rng=jax.random.key(0), start_step=start_step,
            schedule=lambda count: 0.1 * count, checkpointer=saves, metadata={'seed': 7}, writers=[log],
            callbacks=callbacks,
        )  # fmt: skip
    except FloatingPointError as error:
        result = error
    return result, saves, log


def test_steps_are_logged_at_intervals_and_at_the_end():
    (state, done), _, log = run(8, log_every=3)
    assert done == 8 and state.step == 8
    assert [step for step, _ in log.lines] == [3, 6, 8]
    for step, values in log.lines:
        assert values['loss'] == step
        assert values['learning_rate'] == pytest.approx(0.1 * (step - 1))
        rate = values['tokens_per_second']
        assert rate > 0 and math.isfinite(rate)
        assert values['tokens_per_second_per_device'] == pytest.approx(rate / 8)
        assert values['mfu_causal'] == pytest.approx(1e3 * rate / 8 / 1e9)
        assert values['mfu_full'] == pytest.approx(2 * values['mfu_causal'])


def test_callbacks_come_at_their_interval_and_after_the_last_step():
    seen = []

    def callback(state, step):
        assert state.step == step
        seen.append(step)
        return {'validation_loss': 10.0 * step}

    at_end = []
    _, _, log = run(
        10, log_every=0, callbacks=[(4, callback), (0, lambda _, step: at_end.append(step) or {})]
    )
    assert seen == [4, 8, 10] and at_end == [10]
    assert {step: values['validation_loss'] for step, values in log.lines} == {4: 40.0, 8: 80.0, 10: 100.0}


def test_checkpoints_come_at_their_interval_and_after_the_last_step():
    _, saves, log = run(10, log_every=1, checkpoint_every=4)
    assert saves.saved == [
        (step, {'seed': 7, 'rows_consumed': 4 * step, 'lines': step}) for step in (4, 8, 10)
    ]
    assert log.flushed == 10  # what is saved is logged before


def test_a_resumed_run_goes_on_from_its_step():
    (_, done), saves, log = run(10, start_step=7, log_every=1)
    assert done == 10 and [step for step, _ in saves.saved] == [10]
    assert [step for step, _ in log.lines] == [8, 9, 10]
    _, saves, log = run(3, log_every=0, checkpoint_every=0)
    assert [step for step, _ in saves.saved] == [step for step, _ in log.lines] == [3]  # the last alone
    (_, done), saves, _ = run(10, start_step=10)
    assert done == 10 and not saves.saved


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


def test_a_preempted_run_saves_where_it_stands():
    handler = signal.getsignal(signal.SIGTERM)

    def step_fn(state, frozen, batch, rng):
        if batch == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return state.replace(step=state.step + 1), {'loss': jnp.float32(1.0)}

    try:
        (state, done), saves, _ = run(100, step_fn=step_fn, checkpoint_every=3)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert done == 5 == state.step
    assert saves.saved[-1][0] == 5 and saves.saved[-1][1]['rows_consumed'] == 20
    assert [step for step, _ in saves.saved] == [3, 5]


def test_the_signal_is_given_back():
    handler = signal.getsignal(signal.SIGTERM)
    run(2)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_range_of_steps_is_profiled(tmp_path):
    run(4, profile=(1, 2), profile_dir=str(tmp_path))
    assert list(tmp_path.rglob('*.xplane.pb'))
