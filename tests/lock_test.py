"""Who may write into a folder: one process at a time, whatever became of the one before."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from llama_jax import lock
from llama_jax.lock import Locked, hold
from tests.command_line import wait_for

HOLDER = """
import sys
from etils import epath
from llama_jax.lock import hold
release = hold(epath.Path(sys.argv[1]))
print('held', flush=True)
sys.stdin.read()
release()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLDER, str(tmp_path / 'run')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()
    process.communicate()


def test_a_second_one_is_told_whose_it_is_and_a_dead_one_holds_nobody(tmp_path, holder):
    folder = epath.Path(tmp_path / 'run')
    since = r'2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d \S+'
    said = rf'run is in use by another run \(host \S+, process {holder.pid}, since {since}\)'
    for _ in range(2):
        with pytest.raises(Locked, match=said):
            hold(folder)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / lock.FILE).exists()  # of the dead one
    release = hold(folder)
    with pytest.raises(Locked, match=f'process {os.getpid()}'):
        hold(folder)  # within one process too
    release()
    assert not (folder / lock.FILE).exists()
    release = hold(epath.Path(tmp_path / 'filled'))
    (tmp_path / 'filled/results').mkdir()
    release()
    assert [path.name for path in (tmp_path / 'filled').iterdir()] == ['results']
    shutil.rmtree(tmp_path / 'filled')
    hold(epath.Path(tmp_path / 'a/b'))()  # leaves no trace
    release = hold(epath.Path(tmp_path / 'a/b'), beside=True)
    with pytest.raises(Locked, match='a/b is in use'):
        hold(epath.Path(tmp_path / 'a/b'), beside=True)
    assert not (tmp_path / 'a/b').exists()
    release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['run']


def test_on_a_full_disk_nothing_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'pwrite', full)
    for beside in (False, True):
        with pytest.raises(OSError, match='No space'):
            hold(epath.Path(tmp_path / 'a/b'), beside=beside)
    monkeypatch.setattr(lock, '_system_lock', lambda _: None)
    monkeypatch.setattr(lock._BeatingLock, '_content', full)
    with pytest.raises(OSError, match='No space'):
        hold(epath.Path(tmp_path / 'a/b'))
    assert not list(tmp_path.iterdir())


def test_of_many_at_once_one_has_it(tmp_path):
    """Also while others let go of it and take the file away."""
    folder, end, times = epath.Path(tmp_path), time.monotonic() + 60, []

    def take_and_let_go():
        while len(times) < 40 and time.monotonic() < end:
            with contextlib.suppress(Locked):
                release = hold(folder)
                os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL))
                os.unlink(folder / 'inside')
                times.append(time.monotonic())
                release()

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(take_and_let_go) for _ in range(4)]:
            done.result()
    assert len(times) >= 40


def test_a_folder_that_another_takes_away_is_made_again(tmp_path, monkeypatch):
    """As who is refused at once does, that it has made for its lock, and left empty."""
    folder, begin, taken = epath.Path(tmp_path / 'a/run'), lock._system_lock, []

    def locks(file):
        if not taken:
            shutil.rmtree(tmp_path / 'a')
            taken.append(file)
        return begin(file)

    monkeypatch.setattr(lock, '_system_lock', locks)
    release = hold(folder)
    assert taken and (folder / lock.FILE).exists()
    release()
    assert not list(tmp_path.iterdir())
    (gone := tmp_path / 'gone').mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError):  # and not for ever
        hold(epath.Path('run'))


@pytest.fixture
def beating(monkeypatch):
    """Locks as where the file system has none; a beat may be late on a busy machine."""
    monkeypatch.setattr(lock, '_system_lock', lambda file: None)
    monkeypatch.setattr(lock, '_BEAT_SECONDS', 0.1)
    monkeypatch.setattr(lock, '_DEAD_SECONDS', 20.0)


def as_of_another_host(file, owner):
    owner = owner | {'host': 'elsewhere', 'process': 7, 'boot': 'another', 'token': 'another'}
    file.write_text(json.dumps(owner))


def test_without_locks_of_the_system_an_owner_is_heard(tmp_path, beating, monkeypatch):
    folder, file = epath.Path(tmp_path), tmp_path / lock.FILE
    release = hold(folder)
    first = json.loads(file.read_text())
    with pytest.raises(Locked, match=rf'process {os.getpid()}, since {re.escape(first["since"])}'):
        hold(folder)
    release()
    assert not file.exists()
    # Dead on this host, its number given to another process since; at once.
    file.write_text(json.dumps(first | {'started': '1'}))
    start = time.monotonic()
    hold(folder)()
    assert time.monotonic() - start < 20
    # Alive on another, and letting go of it while its file is looked at.
    as_of_another_host(file, first)
    reads = iter([lambda file: json.loads(file.read_text()), lambda file: file.unlink() or {}])
    with monkeypatch.context() as patch:
        patch.setattr(lock._BeatingLock, '_read', lambda self: next(reads)(self._file))
        release = hold(folder)
    release()
    # Dead on another: nobody writes its file.
    monkeypatch.setattr(lock, '_DEAD_SECONDS', 1.0)
    as_of_another_host(file, first)
    start = time.monotonic()
    hold(folder)()
    assert time.monotonic() - start > 1.0
    # Damaged, by nobody.
    file.write_bytes(bytes(100))
    hold(folder)()
    assert not list(tmp_path.iterdir())


def test_who_was_taken_for_dead_ends(tmp_path, beating, monkeypatch, caplog):
    ended = []

    def end(status):
        ended.append(status)
        threading.Event().wait()  # for ever: the thread must not go on to end this process

    monkeypatch.setattr(lock.os, '_exit', end)
    hold(epath.Path(tmp_path))
    file = tmp_path / lock.FILE
    as_of_another_host(file, json.loads(file.read_text()))
    patience = time.monotonic() + 60
    while not ended and time.monotonic() < patience:
        time.sleep(0.01)
    assert ended == [1] and 'was taken over by host elsewhere, process 7' in caplog.text


def test_a_file_that_somebody_took_away_is_written_again(tmp_path, beating, caplog):
    release = hold(epath.Path(tmp_path))
    (tmp_path / lock.FILE).unlink()
    wait_for((tmp_path / lock.FILE).exists)
    with pytest.raises(Locked):
        hold(epath.Path(tmp_path))
    release()
    assert 'run.lock was taken away' in caplog.text and not (tmp_path / lock.FILE).exists()
