"""What becomes of answers: scores, counts, and evaluations that go on where they were killed."""

import dataclasses
import json
from contextlib import closing

import pytest

from llama_jax.errors import InputError
from llama_jax.eval import harness
from llama_jax.eval.harness import Sampling, evaluate, prepare
from llama_jax.eval.task import Completion, Continuation, Likelihood, Task
from llama_jax.eval.tasks import find_task
from llama_jax.item_log import ItemLog
from llama_jax.storage import enable_bucket
from tests.reference.fake_gcs import FakeGCS


class Counting:
    """Answers with the length of what it is asked, and dies after so many requests."""

    def __init__(self, dies_after=10**9):
        self.asked, self._dies_after = [], dies_after

    def answer(self, requests):
        for request in requests:
            if len(self.asked) == self._dies_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            yield request, Likelihood(-float(len(request.context)), truncated='a2' in request.context)


def toy_task(num_documents=6, question='a'):
    return Task(
        name='toy',
        load=lambda data_dir: [{'id': index} for index in range(num_documents)],
        ask=lambda d, prefix: [Continuation(f'{question}{d["id"]}', ' b'), Continuation('same', ' b')],
        grader=lambda d, results, graders: {
            'acc': float(results[0].log_probability > results[1].log_probability)
        },
        answer=lambda d: (0,),
        metrics=('acc',),
    )


def test_equal_requests_are_asked_once_and_what_was_cut_is_counted():
    engine = Counting()
    found = evaluate(prepare(toy_task(), ''), engine, progress=False)
    assert found == {'acc': 1.0, 'n': 6, 'num_fewshot': 0, 'truncated': 1}
    assert len(engine.asked) == 7 and engine.asked[0].context == 'same'


def test_requests_are_asked_in_the_order_of_the_items():
    """Whatever a process hashes texts to: from what is batched together the last bits of scores follow."""
    engine = Counting()
    evaluate(prepare(toy_task(num_documents=20), ''), engine, progress=False)
    assert [asked.context for asked in engine.asked] == ['same', *(f'a{index}' for index in range(20))]
    engine.asked.clear()
    evaluate(prepare(choices_task(), ''), engine, progress=False)
    assert [asked.continuation for asked in engine.asked] == [f' {index}' for index in range(20)]


def choices_task():
    return dataclasses.replace(
        toy_task(num_documents=1),
        ask=lambda d, prefix: [Continuation('a', f' {index}') for index in range(20)],
    )


def test_a_killed_evaluation_goes_on(tmp_path):
    path = tmp_path / 'samples' / 'toy.jsonl'
    header = {'task': 'toy', 'model': 'm'}
    with closing(ItemLog(path, header)) as log, pytest.raises(KeyboardInterrupt):
        evaluate(prepare(toy_task(), ''), Counting(dies_after=4), log=log, progress=False)
    finished = path.read_text()
    assert [json.loads(line).get('index') for line in finished.splitlines()] == [None, 0, 1, 2]
    path.write_text(finished + '{"index": 3, "sco')  # a line that a kill cut off
    engine = Counting()
    with closing(ItemLog(path, header)) as log:
        found = evaluate(prepare(toy_task(), ''), engine, log=log, progress=False)
    assert found == {'acc': 1.0, 'n': 6, 'num_fewshot': 0, 'truncated': 1}
    assert {request.context for request in engine.asked} == {'same', 'a3', 'a4', 'a5'}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line['index'] for line in lines[1:]) == list(range(6))
    assert lines[1]['requests'][0]['context'] == 'a0' and lines[1]['scores'] == {'acc': 1.0}
    # More items of the same go on too; other ones are refused.
    with closing(ItemLog(path, header)) as log:
        assert evaluate(prepare(toy_task(8), ''), Counting(), log=log, progress=False)['n'] == 8
        with pytest.raises(InputError, match='item 0 of toy is asked otherwise'):
            evaluate(prepare(toy_task(question='b'), ''), Counting(), log=log, progress=False)
    with pytest.raises(InputError, match="of another run: model was 'm' and is 'n'"):
        ItemLog(path, header | {'model': 'n'})
    path.write_text('no JSON\n')
    with pytest.raises(InputError, match='is no log of items'):
        ItemLog(path, header)


def test_a_log_from_before_there_were_further_settings_goes_on():
    asked = Completion('a', ('\n',), 8)
    assert harness._hash([asked]) == '17be8cacb08e02f9'
    assert harness._hash([dataclasses.replace(asked, further=(('top_k', 5),))]) != '17be8cacb08e02f9'


def test_a_damaged_line_of_a_log_is_dropped_and_said(tmp_path, caplog):
    path, header = tmp_path / 'toy.jsonl', {'task': 'toy'}
    with closing(ItemLog(path, header)) as log:
        for index in range(4):
            log.add({'index': index})
    lines = path.read_bytes().splitlines()
    lines[1:4] = bytes(20), b'{"index": [1]}', b'[' * 100_000
    path.write_bytes(b''.join(line + b'\n' for line in lines))
    with closing(ItemLog(path, header)) as log:
        assert list(log.items) == [3]
    assert 'toy.jsonl: 3 damaged lines dropped; their items are done again' in caplog.text


def test_a_log_in_a_bucket_is_written_whole(monkeypatch):
    with FakeGCS() as gcs:
        for name, value in gcs.environment().items():
            monkeypatch.setenv(name, value)
        enable_bucket('gs://bucket')
        path, header = 'gs://bucket/run/samples/toy.jsonl', {'task': 'toy'}
        with closing(ItemLog(path, header)) as log:
            evaluate(prepare(toy_task(4), ''), Counting(), log=log, progress=False)
        with closing(ItemLog(path, header)) as log:
            assert sorted(log.items) == [0, 1, 2, 3]
            engine = Counting()
            assert evaluate(prepare(toy_task(5), ''), engine, log=log, progress=False)['n'] == 5
            assert len(engine.asked) == 2
        lines = gcs.objects['bucket', 'run/samples/toy.jsonl'].decode().splitlines()
        assert len(lines) == 6
        assert gcs.counts['copy'] == 0 and gcs.refused == []


def test_settings_that_are_impossible_are_refused(shared_data):
    data_dir = str(shared_data / 'eval')
    with pytest.raises(InputError, match='limit is -1'):
        prepare(find_task('piqa'), data_dir, limit=-1)
    with pytest.raises(InputError, match='num_samples is 0'):
        prepare(find_task('piqa'), data_dir, sampling=Sampling(num_samples=0))
    with pytest.raises(InputError, match='num_samples is 1048577; it must be from 1 to 1,048,576'):
        prepare(find_task('piqa'), data_dir, sampling=Sampling(num_samples=(1 << 20) + 1))
    with pytest.raises(InputError, match='temperature is -1'):
        prepare(find_task('piqa'), data_dir, sampling=Sampling(temperature=-1.0))
    with pytest.raises(InputError, match='top_p is 2'):
        prepare(find_task('piqa'), data_dir, sampling=Sampling(top_p=2.0))
    prepared = prepare(find_task('human_eval'), data_dir, limit=2, sampling=Sampling(3, temperature=0.8))
    assert [(r.num_samples, r.temperature) for (r,) in prepared.requests] == [(3, 0.8)] * 2
    with pytest.raises(InputError, match='executes generated code, which is off'):
        evaluate(prepared, Counting(), progress=False)


def test_without_a_terminal_the_progress_is_lines(monkeypatch, caplog, capsys):
    monkeypatch.setattr(harness, '_SECONDS_BETWEEN_LINES', -1.0)
    with caplog.at_level('INFO'):
        evaluate(prepare(toy_task(), ''), Counting())
    assert caplog.messages[-1] == 'toy: 6 of 6 items'
    assert not capsys.readouterr().err
