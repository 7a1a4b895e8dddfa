import json
import sys
import types

import pytest
from etils import epath

from llama_jax.train.metrics import JsonlWriter, TensorBoardWriter, WandbWriter, plot_loss, read_metrics


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


def test_tensorboard_gets_what_is_finite(tmp_path):
    writer = TensorBoardWriter(tmp_path / 'tensorboard')
    writer.write(1, {'loss': 2.5, 'broken': float('nan')})
    writer.close()
    (events,) = (tmp_path / 'tensorboard').iterdir()
    assert b'loss' in events.read_bytes() and b'broken' not in events.read_bytes()


@pytest.mark.parametrize('baselines', [{}, {'unigram': 3.0}])
def test_the_loss_is_drawn(tmp_path, baselines):
    metrics = [{'step': 1, 'loss': 4.0}, {'step': 2, 'loss': 3.5, 'validation_loss': 3.75}]
    plot_loss(tmp_path / 'loss.png', json.loads(json.dumps(metrics)), baselines)
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_wandb_gets_each_step_and_the_run_of_before(monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append('finished')

    def init(**settings):
        calls.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    writer = WandbWriter('project', 'run-1', {'seed': 0})
    writer.write(3, {'loss': 2.0})
    writer.close()
    assert calls == [
        {'project': 'project', 'id': 'run-1', 'resume': 'allow', 'config': {'seed': 0}},
        (3, {'loss': 2.0}),
        'finished',
    ]
