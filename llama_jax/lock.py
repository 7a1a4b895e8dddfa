"""One run in a folder at a time. A second one is told whose it is; what a dead one left behind holds nobody.

On a disk the system keeps the lock (`flock`), across the hosts of a network share too, and lets go of it when the
process ends, however it does. A bucket, and a share without locks, hold a file with the owner's name instead, which the
owner writes again every few seconds: where it does not, it is dead, and the file is taken over.
"""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import fsspec
from etils import epath

from llama_jax.errors import InputError, error_line

FILE = 'run.lock'

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 10.0
_DEAD_SECONDS = 35.0  # without a beat, as seen by who waits
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Locked(InputError):
    """Another process uses the folder; nothing in it is ours to touch."""


def hold(folder: epath.Path, *, beside: bool = False) -> Callable[[], None]:
    """From now on no other process holds the folder, which is made where it is missing, and goes again if left empty.

    Args:
      folder: local or `gs://...`.
      beside: it must not be there yet, and is made when it is complete; so the lock lies beside it.

    Returns:
      What lets go of it; the end of the process does too.

    Raises:
      Locked: another holds it; the line tells which, where and since when.
    """
    file = folder.parent / f'.{folder.name}.{FILE}' if beside else folder / FILE
    if '://' in os.fspath(folder):
        return _BeatingLock(file).release
    made, release = _lock_in_folder(file)

    def let_go() -> None:
        release()
        _remove_empty(made)

    return let_go


def _lock_in_folder(file: epath.Path) -> tuple[list[epath.Path], Callable[[], None]]:
    """(the folders that were made for the file, the deepest first; what lets go of it)."""
    for is_last in [False] * 99 + [True]:
        made = [path for path in file.parents if not path.exists()]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return made, _system_lock(file) or _BeatingLock(file).release
        except FileNotFoundError:  # who had made the folder has let go of it just now, and it went
            if is_last:
                raise
        except BaseException:
            _remove_empty(made)
            raise
    raise AssertionError


def _remove_empty(folders: list[epath.Path]) -> None:
    with contextlib.suppress(OSError):  # where something was written
        for folder in folders:
            os.rmdir(folder)


def _system_lock(file: epath.Path) -> Callable[[], None] | None:
    """The system's lock of a file, which holds as long as the file is open; None where the file system has none."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise _locked(file, _await_owner(descriptor)) from None
                if error.errno in _NO_LOCKS:
                    return None
                raise
            if not _is_same_file(descriptor, file):
                continue  # who had it has just let go of it and taken the file away
            failed.callback(file.unlink, missing_ok=True)  # on a full disk nothing is left
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, _describe_owner().encode(), 0)
            failed.pop_all()
            return functools.partial(_release_system_lock, file, descriptor)


def _release_system_lock(file: epath.Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):  # on a disk that has failed it stays, and holds nobody
        file.unlink()  # first, while nobody else can have it
    os.close(descriptor)


def _await_owner(descriptor: int) -> dict[str, Any]:
    """What the owner has written, or is about to."""
    for _ in range(20):
        if owner := _parse(os.pread(descriptor, 4096, 0)):
            return owner
        time.sleep(0.05)
    return {}


def _is_same_file(descriptor: int, file: epath.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


class _BeatingLock:
    """A file that its owner writes again and again."""

    def __init__(self, file: epath.Path):
        self._file, self._token = file, uuid.uuid4().hex
        self._since = _now()
        if not self._create():
            self._take_over()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='lock', daemon=True)
        self._thread.start()

    def _content(self) -> bytes:
        return _describe_owner(token=self._token, since=self._since, beat=time.time()).encode()

    def _create(self) -> bool:
        """Whether there was none, and now there is ours."""
        system, path = fsspec.url_to_fs(os.fspath(self._file))
        try:
            if '://' in os.fspath(self._file):
                system.pipe_file(path, self._content(), mode='create')  # a condition that the bucket checks
            else:
                with open(path, 'xb', buffering=0) as file:
                    try:
                        file.write(self._content())
                    except BaseException:
                        os.unlink(path)
                        raise
        except FileExistsError:
            return False
        return True

    def _write(self) -> None:
        if '://' in os.fspath(self._file):
            self._file.write_bytes(self._content())
        else:
            beside = self._file.parent / f'.{FILE}.{self._token}'
            beside.write_bytes(self._content())
            os.replace(beside, self._file)

    def _read(self) -> dict[str, Any]:
        """What is in the file; {} where there is none, or nothing to be understood."""
        try:
            return _parse(self._file.read_bytes())
        except FileNotFoundError:
            return {}

    def _take_over(self) -> None:
        """Waits until the owner is seen to be alive, which is refused, or dead."""
        first = self._read()
        end = time.monotonic() + (0 if _has_died(first) else _DEAD_SECONDS)
        if end > time.monotonic():
            logger.info('%s names %s; waiting to see whether it is alive', self._file, _owner(first))
        while time.monotonic() < end:
            if not self._file.exists() and self._create():
                return  # it has let go of it
            if (now := self._read()) and now != first:
                raise _locked(self._file, now)
            time.sleep(min(1.0, _BEAT_SECONDS / 4))
        self._write()
        time.sleep(min(1.0, _BEAT_SECONDS / 4))  # of two that take over at once, the later has it
        if (now := self._read()).get('token') != self._token:
            raise _locked(self._file, now)

    def _beat(self) -> None:
        beaten = time.monotonic()
        while not self._released.wait(_BEAT_SECONDS):
            try:
                now = self._read()
                is_gone = (
                    not now and time.monotonic() - beaten < _DEAD_SECONDS
                )  # nobody could take it over since
                if is_gone:
                    logger.warning('%s was taken away; its owner is alive and writes it again', self._file)
                if is_gone or now.get('token') == self._token:
                    self._write()
                    beaten = time.monotonic()
                    continue
            except Exception as error:  # of a bucket's client; the next beat may succeed
                logger.warning('%s cannot be written: %s', self._file, error_line(error))
                continue
            # This process stood still for so long that another took it for dead, and writes here now.
            logger.error('%s was taken over by %s; this process ends', self._file, _owner(now))
            os._exit(1)

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError):
            if self._read().get('token') == self._token:
                self._file.unlink()


def _describe_owner(**more: Any) -> str:
    owner = {'host': socket.gethostname(), 'process': os.getpid(), 'since': _now()}
    return json.dumps(owner | _place(os.getpid()) | more) + '\n'


def _now() -> str:
    return time.strftime('%Y-%m-%d %H:%M:%S %Z')


def _place(process: int) -> dict[str, str]:
    """What tells a process from all others that have had its number; {} where it is not there, or not to be told."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as boot, open(f'/proc/{process}/stat') as stat:
            started = stat.read().rpartition(')')[2].split()[19]
            return {
                'boot': boot.read().strip(),
                'space': os.readlink('/proc/self/ns/pid'),
                'started': started,
            }
    except (OSError, IndexError):
        return {}


def _has_died(owner: dict[str, Any]) -> bool:
    """Whether an owner can be seen from here to have ended: it ran in this system, and is not there."""
    here = _place(os.getpid())
    if not here or any(owner.get(name) != here[name] for name in ('boot', 'space')):
        return False
    return _place(owner.get('process', 0)).get('started') != owner.get('started')


def _parse(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
        return owner if isinstance(owner, dict) else {}
    except (ValueError, RecursionError):
        return {}


def _owner(owner: dict[str, Any]) -> str:
    unknown = 'unknown'
    return (
        f'host {owner.get("host", unknown)}, process {owner.get("process", unknown)}, '
        f'since {owner.get("since", unknown)}'
    )


def _locked(file: epath.Path, owner: dict[str, Any]) -> Locked:
    beside = file.name != FILE
    folder = file.with_name(file.name[1:].removesuffix(f'.{FILE}')) if beside else file.parent
    return Locked(
        f'{folder} is in use by another run ({_owner(owner)}); wait for its end or stop it, or remove {file} '
        'where its host is gone for good'
    )
