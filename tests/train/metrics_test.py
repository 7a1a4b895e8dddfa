import errno
import json
import struct
import sys
import threading
import time
import types

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from llama_jax.errors import InputError
from llama_jax.train.metrics import (
    Aside,
    JsonlWriter,
    TensorBoardWriter,
    WandbWriter,
    loss_figure,
    plot_loss,
    read_metrics,
)


def steps(path):
    return [item['step'] for item in read_metrics(path)]


def test_resuming_cuts_back_to_the_restored_step(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    writer = JsonlWriter(path)
    for step in (1, 2, 3, 4):
        writer.write(step, {'loss': 1 / step})
        assert steps(path) == list(range(1, step + 1))  # a kill loses nothing that was written
    with path.open('a') as file:
        file.write('{"step": 5, "lo')  # a kill while it wrote
    assert steps(path) == [1, 2, 3, 4]
    writer.close()
    writer = JsonlWriter(path, restored_step=2)
    assert steps(path) == [1, 2]
    writer.write(3, {'loss': 0.25})
    writer.close()
    assert read_metrics(path) == [
        {'step': 1, 'loss': 1.0},
        {'step': 2, 'loss': 0.5},
        {'step': 3, 'loss': 0.25},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ['metrics.jsonl']


DAMAGED = {
    'zeros': lambda lines: [*lines[:2], bytes(20), *lines[3:]],
    'no object': lambda lines: [*lines[:2], b'[3]', *lines[3:]],
    'no step': lambda lines: [*lines[:2], b'{"loss": 1.0}', *lines[3:]],
    'not UTF-8': lambda lines: [*lines[:2], b'{"step": 3, "loss\xff": 1.0}', *lines[3:]],
    'deep': lambda lines: [*lines[:2], b'[' * 100_000, *lines[3:]],
    'a step of before': lambda lines: [*lines[:2], lines[0], *lines[3:]],
}


@pytest.mark.parametrize('damage', DAMAGED)
def test_a_damaged_line_is_dropped_and_said(tmp_path, caplog, damage):
    path = tmp_path / 'metrics.jsonl'
    writer = JsonlWriter(path)
    for step in range(1, 6):
        writer.write(step, {'loss': 1 / step})
    kept = writer.flush()
    writer.close()
    path.write_bytes(b''.join(line + b'\n' for line in DAMAGED[damage](path.read_bytes().splitlines())))
    JsonlWriter(path, 5, kept).close()
    assert steps(path) == [1, 2, 4, 5]
    assert 'metrics.jsonl: 1 line is damaged and dropped (line 3)' in caplog.text
    assert 'of the 5 steps that were logged up to step 5, 1 are lost' in caplog.text


def test_figures_that_are_lost_or_changed_are_said(tmp_path, caplog):
    path = tmp_path / 'metrics.jsonl'
    writer = JsonlWriter(path)
    for step in range(1, 4):
        writer.write(step, {'loss': 0.5})
    kept = writer.flush()
    writer.write(4, {'loss': 0.5})
    writer.close()
    whole = path.read_text()
    for text, said in (
        (whole, ''),
        ('', 'of the 3 steps that were logged up to step 3, 3 are lost'),
        (whole.replace('0.5', '0.4', 1), 'the figures up to step 3 are not those that were logged'),
        (whole[:-1].replace('\n', ' '), 'of the 3 steps that were logged up to step 3, 3 are lost'),
    ):
        caplog.clear()
        path.write_text(text)
        JsonlWriter(path, 3, kept).close()
        assert said in caplog.text and bool(said) == bool(caplog.text)
    path.unlink()
    JsonlWriter(path, 3).close()  # of a checkpoint that knows nothing of it


def test_what_a_step_is_measured_at_joins_its_line(tmp_path, caplog):
    path = tmp_path / 'metrics.jsonl'
    writer = JsonlWriter(path)
    writer.write(1, {'loss': 2.0})
    writer.write(2, {'loss': 1.5})
    kept = writer.flush()
    writer.write(2, {'validation_loss': 1.25})
    writer.write(2, {'piqa/acc': 0.5})
    joined = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5, "validation_loss": 1.25, "piqa/acc": 0.5}\n'
    assert path.read_text() == joined
    writer.write(3, {'loss': 1.0})
    writer.close()
    writer = JsonlWriter(path, 2, kept)
    assert not caplog.text  # nothing of what the checkpoint knows was lost
    writer.write(2, {'piqa/acc': 0.75})  # as a run that is resumed makes up for it
    writer.close()
    assert path.read_text() == joined.replace('0.5}', '0.75}')


def test_a_fresh_start_empties_the_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1, "loss": 2.0}\n')
    JsonlWriter(path).close()
    assert path.read_text() == ''
    assert read_metrics(tmp_path / 'none.jsonl') == []


def test_an_object_store_gets_the_whole_file_at_each_flush(tmp_path, monkeypatch):
    local, writes = epath.Path(tmp_path / 'metrics.jsonl'), []
    monkeypatch.setattr('llama_jax.train.metrics.epath.Path', lambda path: local)  # what gs:// would lead to
    monkeypatch.setattr(
        'llama_jax.train.metrics.write_atomically',
        lambda path, data: (writes.append(data), path.write_bytes(data)),
    )
    url = 'gs://bucket/run/metrics.jsonl'
    writer = JsonlWriter(url)
    for step in (1, 2):
        writer.write(step, {'loss': 1.0})
    assert writes == [b'']
    writer.flush()
    writer.flush()  # nothing new: nothing written
    assert steps(url) == [1, 2] and len(writes) == 2
    writer.write(3, {'loss': 1.0})
    writer.close()
    assert steps(url) == [1, 2, 3]
    writer.write(3, {'validation_loss': 0.5})
    writer.flush()
    assert read_metrics(url)[2:] == [{'step': 3, 'loss': 1.0, 'validation_loss': 0.5}]
    JsonlWriter(url, restored_step=1).close()
    assert steps(url) == [1]


def events(folder):
    """[(step, {name: value}, whether it marks a start)] of the records under a folder, read as TensorBoard does."""
    found = []
    for file in sorted(folder.iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack('<Q', data[place : place + 8])
            check, record, record_check = struct.unpack(f'<I{size}sI', data[place + 8 : place + 16 + size])
            assert check == masked_crc32c(data[place : place + 8]) and record_check == masked_crc32c(record)
            event = Event.FromString(record)
            place += 16 + size
            scalars = {value.tag: value.simple_value for value in event.summary.value}
            found.append((event.step, scalars, event.session_log.status == SessionLog.START))
    return found


def test_tensorboard_gets_what_is_finite(tmp_path):
    writer = TensorBoardWriter(tmp_path / 'tensorboard')
    writer.write(1, {'loss': 2.5, 'broken': float('nan')})
    assert events(tmp_path / 'tensorboard') == [(0, {}, False), (1, {}, True), (1, {'loss': 2.5}, False)]
    writer.close()


@pytest.mark.parametrize('in_bucket', [False, True])
def test_tensorboard_drops_the_steps_behind_the_checkpoint(tmp_path, monkeypatch, in_bucket):
    place = epath.Path(tmp_path / 'tensorboard')
    place.mkdir()
    if in_bucket:
        monkeypatch.setattr('llama_jax.train.metrics.epath.Path', lambda path: place)
    for restored, last in ((0, 6), (4, 5)):
        monkeypatch.setattr(
            time, 'time', lambda restored=restored: 1e9 + restored
        )  # names rise with the time
        writer = TensorBoardWriter('gs://bucket/tensorboard' if in_bucket else place, restored)
        for step in range(restored + 1, last + 1):
            writer.write(step, {'loss': 1.0})
        writer.close()
    kept = []
    for step, scalars, is_start in events(place):
        if is_start:  # what TensorBoard does at one
            kept = [before for before in kept if before < step]
        kept += [step] if scalars else []
    assert kept == [1, 2, 3, 4, 5]
    assert len(list(place.iterdir())) == 2


class Failing:
    """A writer whose disk is full, or whose service does not answer, from the second step on."""

    def __init__(self, failure):
        self.steps, self._failure, self.let_go, self.abandoned = (
            [],
            failure,
            threading.Event(),
            threading.Event(),
        )

    def write(self, step, values):
        if step > 1 and self._failure == 'hangs':
            self.let_go.wait(60)
        if step > 1:
            raise OSError(errno.ENOSPC, 'No space left on device')
        self.steps.append(step)

    def flush(self):
        return {}

    def close(self):
        pass

    def abandon(self):
        self.abandoned.set()
        raise OSError('nobody is there')


@pytest.mark.parametrize('failure', ['fails', 'hangs'])
def test_a_writer_aside_ends_alone(caplog, failure):
    writer = Failing(failure)
    # Of what fails at once nothing is waited for, however busy the machine.
    aside = Aside('TensorBoard', lambda: writer, patience=1.0 if failure == 'hangs' else 60.0)
    start = time.monotonic()
    for step in range(1, 50):
        aside.write(step, {'loss': 1.0})
        aside.flush()
    aside.close()
    assert time.monotonic() - start < 30 and writer.steps == [1]
    assert writer.abandoned.wait(60)
    (line,) = caplog.messages
    reason = 'No space left on device' if failure == 'fails' else 'it has not answered for 1 s'
    assert line.startswith('TensorBoard takes no more figures') and reason in line
    writer.let_go.set()


def test_a_writer_aside_takes_all(tmp_path):
    aside = Aside('TensorBoard', lambda: TensorBoardWriter(tmp_path))
    for step in range(1, 200):
        aside.write(step, {'loss': 1.0})
    aside.close()
    assert [step for step, scalars, _ in events(tmp_path) if scalars] == list(range(1, 200))


@pytest.mark.parametrize('baselines', [{}, {'unigram': 3.0}])
def test_the_loss_is_drawn(tmp_path, baselines):
    metrics = [{'step': 1, 'loss': 4.0}, {'step': 2, 'loss': 3.5, 'validation_loss': 3.75}]
    plot_loss(tmp_path / 'loss.png', json.loads(json.dumps(metrics)), baselines)
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')


@pytest.fixture
def wandb(monkeypatch):
    """What W&B was asked for."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append('finished'),
        status=lambda: None,
    )
    module = types.SimpleNamespace(
        init=lambda **settings: calls.append(settings) or run, Error=RuntimeError,
        teardown=lambda: calls.append('abandoned'),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return calls


def test_wandb_gets_each_step_and_the_run_of_before(tmp_path, wandb):
    for folder in ('ann/tiny', 'ben/tiny', 'ann/tiny'):
        writer = WandbWriter('project', tmp_path / folder, {'seed': 0})
        writer.write(3, {'loss': 2.0})
        writer.close()
    first, other, again = wandb[::3]
    assert wandb[1:3] == [(3, {'loss': 2.0}), 'finished']
    assert first == again and first['id'] != other['id']
    assert len(first.pop('id')) == 32 and first.pop('dir') == str(tmp_path / 'ann/tiny')
    assert first == {'project': 'project', 'name': 'tiny', 'resume': 'allow', 'config': {'seed': 0}}


def test_wandb_that_is_missing_or_refuses_is_one_line(tmp_path, wandb, monkeypatch):
    def refuse(**settings):
        raise RuntimeError('api_key not configured (no-tty)')

    monkeypatch.setattr(sys.modules['wandb'], 'init', refuse)
    with pytest.raises(InputError, match='W&B cannot begin: .*api_key not configured'):
        WandbWriter('project', tmp_path, {})
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(InputError, match=r"pip install 'llama_jax\[wandb\]'"):
        WandbWriter('project', tmp_path, {})


def test_a_figure_is_of_the_loss_in_its_unit_and_shows_a_run_of_one_line():
    logged = [{'step': 2, 'loss': 2.1, 'nll': 7.5}]
    for unit, label in (('nats per token', 'nll'), ('loss per pair', 'loss')):
        (axes,) = loss_figure(logged, {}, unit).axes
        (line,) = axes.get_lines()
        assert (axes.get_ylabel(), line.get_label(), line.get_marker()) == (unit, label, '.')
        assert all(place == int(place) for place in axes.get_xticks())
