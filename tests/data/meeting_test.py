"""Machines that meet in a folder: one that gives up is heard by the others."""

import json
import os
import shutil
import threading
import time

import pytest
from etils import epath

from llama_jax.data import meeting, unit_tasks
from llama_jax.data import prepare as prepare_module
from llama_jax.data.meeting import BEGUN, Meeting
from llama_jax.data.preparation import Machine, Preparation, TextSource
from llama_jax.data.prepare import REPORT, WORK, prepare
from llama_jax.errors import InputError, SystemFailure, SystemRefusal
from tests.data.packing_test import Letters, documents


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Six files, a task each for three machines."""
    monkeypatch.setattr(meeting, '_SECONDS_BETWEEN_LOOKS', 0.01)
    for number in range(6):
        lines = [json.dumps({'text': text}) for text in documents(30, seed=number)]
        (tmp_path / f'{number}.jsonl').write_text('\n'.join(lines))
    source = TextSource('documents', (f'{tmp_path}/*.jsonl',))
    return Preparation(str(tmp_path / 'data'), (source,), 32, unit_bytes=300)


def together(asked):
    """What each of three machines, in threads, ended with: '' where it was done, else its line, and its kind."""
    ends, kinds = [''] * 3, [None] * 3

    def one(index):
        try:
            prepare(asked, Letters(), machine=Machine(index, 3))
        except (InputError, SystemFailure) as error:
            ends[index], kinds[index] = str(error), type(error)

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(set(kinds) - {None}) <= 1  # all end with one status
    return ends, kinds[0]


@pytest.mark.parametrize('kind', [InputError, SystemRefusal, SystemFailure])
def test_a_machine_that_gives_up_is_heard_and_all_go_on_when_they_start_again(
    asked, tmp_path, monkeypatch, kind
):
    write = unit_tasks._write

    def refuse(task, *args, **kwargs):
        if task.number % 3 == 1:  # of machine 1
            raise kind('the file is gone')
        return write(task, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(unit_tasks, '_write', refuse)
        ends, ended = together(asked)
        assert ended is kind
        assert ends[1] == 'the file is gone'
        heard = 'machine 1 has given up: the file is gone; mend that, and start all again'
        assert ends[0] == ends[2] == heard
        assert list((tmp_path / 'data' / WORK).glob('given-up-*.json'))
        assert together(asked)[0][0] == heard  # said anew, not what stood there
    assert together(asked) == ([''] * 3, None)
    assert not (tmp_path / 'data' / WORK).exists() and (tmp_path / 'data/manifest.json').exists()
    assert (
        'already holds prepared data' in together(asked)[0][2]
    )  # nobody waits for a machine 0 that is refused too


@pytest.mark.parametrize('look', ['_await_records', '_is_scanned', '_is_written', '_scan'])
def test_a_machine_that_looks_when_the_records_have_been_taken_away_is_done(
    asked, tmp_path, monkeypatch, look
):
    folder, finish, now = tmp_path / 'data', prepare_module._finish, getattr(unit_tasks, look)
    finishing, looking, reports = threading.Event(), threading.Event(), []

    def finish_later(*args):
        finishing.set()
        assert looking.wait(60)
        return finish(*args)

    def look_later(*args, **options):
        if threading.current_thread().name == 'started again':
            looking.set()
            while (folder / WORK).exists():
                time.sleep(0.01)
        return now(*args, **options)

    def take_part(index):
        reports.append(prepare(asked, Letters(), machine=Machine(index, 3)))

    monkeypatch.setattr(prepare_module, '_finish', finish_later)
    monkeypatch.setattr(unit_tasks, look, look_later)
    threads = [threading.Thread(target=take_part, args=(index,), daemon=True) for index in range(3)]
    for thread in threads:
        thread.start()
    assert finishing.wait(60)
    if look == '_scan':  # what was touched is read again, and then to be recorded
        for file in tmp_path.glob('*.jsonl'):
            os.utime(file)
    threads.append(threading.Thread(target=take_part, args=(2,), daemon=True, name='started again'))
    threads[-1].start()
    for thread in threads:
        thread.join(timeout=60)
    assert reports == [json.loads((folder / REPORT).read_text())] * 4
    assert not (folder / WORK).exists()


def test_a_machine_that_gives_up_as_the_folder_goes_does_not_make_it_anew(tmp_path, monkeypatch):
    work, write = epath.Path(tmp_path) / WORK, meeting.write_atomically
    work.mkdir()
    (work / BEGUN).write_text('{}')

    def taken_away_just_before(*args):
        work.rmtree()
        write(*args)

    monkeypatch.setattr(meeting, 'write_atomically', taken_away_just_before)
    with pytest.raises(SystemFailure, match='the disk is gone'), Meeting(work, Machine(1, 3)).told():
        raise SystemFailure('the disk is gone')
    assert not work.exists()


def test_a_file_that_comes_while_the_folder_is_taken_away_goes_too(asked, monkeypatch):
    work, late = epath.Path(asked.output) / WORK, [b'of a machine that looked just before']

    def meanwhile(folder):
        for file in os.scandir(folder):
            os.unlink(file)
        if late:
            (work / 'given-up-0001.json').write_bytes(late.pop())
        os.rmdir(folder)

    monkeypatch.setattr(shutil, 'rmtree', meanwhile)
    prepare(asked, Letters())
    assert not late and not work.exists()


def test_who_waits_says_so_soon(tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(meeting.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(meeting.time, 'sleep', lambda seconds: now.append(now.pop() + seconds))
    caplog.set_level('INFO')
    Meeting(epath.Path(tmp_path), Machine(0, 2)).wait(lambda: now[0] > 70, 'machine 1')
    assert caplog.messages == ['waiting for machine 1'] * 2  # behind two seconds, and a minute later
