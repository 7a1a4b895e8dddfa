"""Places of files: local paths and gs:// buckets, files and folders that appear whole, reading ahead."""

import contextlib
import errno
import importlib.util
import logging
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from llama_jax.errors import InputError, SystemFailure, SystemRefusal, error_line

T = TypeVar('T')

logger = logging.getLogger(__name__)

# What a wrong path causes; such errors name it, and stay what they are.
_PATH_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_BUCKET_CLIENTS = ('gcsfs', 'aiohttp', 'google', 'requests')
_PATH_ERROR_NUMBERS = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTEMPTY)
# What only the user can grant, by the system's number of its refusal.
REMEDIES = {
    errno.ENOSPC: 'make room there', errno.EDQUOT: 'make room there, or raise the quota',
    errno.EFBIG: 'allow larger files (ulimit -f)',
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), 'allow it, or name another place'),
}  # fmt: skip


def enable_bucket(path: str | os.PathLike) -> None:
    """Call before `path` is first looked at; does nothing where it is local.

    Raises:
      InputError: it is in a bucket, and the package that reaches it is missing; or it is another kind of address.
    """
    text = os.fspath(path)
    if not text.startswith('gs://'):
        if '://' in text:
            raise InputError(f'{text} is no path; give a local one or gs://BUCKET/PATH')
        return
    if importlib.util.find_spec('gcsfs') is None:
        raise InputError(f"{text} needs the package gcsfs: pip install 'llama_jax[gcs]'")
    import fsspec

    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # what it logs, with a traceback, it raises too
    # Otherwise gcsfs answers from what a folder held at first; TensorStore and other processes write there too.
    for protocol in ('gs', 'gcs'):
        fsspec.config.conf.setdefault(protocol, {})['use_listings_cache'] = False


def read_range(path, offset: int, length: int) -> bytes:
    """These bytes of a file, fewer where it ends; of a bucket no more than they are transferred.

    Args:
      path: an `epath.Path`, local or `gs://...`.
      offset: of the first byte.
      length: how many.
    """
    if '://' not in os.fspath(path):
        with open(path, 'rb') as file:
            file.seek(offset)
            return file.read(length)
    import fsspec

    system, name = fsspec.core.url_to_fs(os.fspath(path))
    if not length or (not offset and not system.info(name)['size']):
        return b''  # a bucket has no empty range
    return system.cat_file(name, start=offset, end=offset + length)


def open_sparsely(path, from_start: bool = False) -> Any:
    """Opens a file of which little is read, for `with`: of a bucket not 5 MiB more than that, as is usual.

    Args:
      path: an `epath.Path`, local or `gs://...`.
      from_start: it is read from its start, in many small pieces, and not scattered.
    """
    if '://' not in os.fspath(path):
        return open(path, 'rb')
    if from_start:
        return contextlib.nullcontext(_ReadAhead(path))
    import fsspec

    system, name = fsspec.core.url_to_fs(os.fspath(path))
    return system.open(name, 'rb', cache_type='none')


class _ReadAhead:
    """The start of a file in a bucket; each request is for as much again as the ones before have brought."""

    def __init__(self, path):
        self._path, self._length = path, path.stat().length
        self._position, self._waiting = 0, b''

    def read(self, count: int) -> bytes:
        if (missing := count - len(self._waiting)) > 0:
            ahead = min(max(self._position, 4 << 10), 1 << 20)
            size = min(max(missing, ahead), self._length - self._position)
            self._waiting += read_range(self._path, self._position, size) if size else b''
            self._position += size
        data, self._waiting = self._waiting[:count], self._waiting[count:]
        return data


@contextlib.contextmanager
def system_failures(what: str) -> Iterator[None]:
    """Within, what the system fails at (a full disk, a broken device, a bucket out of reach) becomes one line.

    Args:
      what: begins the line: 'PATH cannot be written'.

    Raises:
      SystemFailure: instead of an OSError, of TensorStore's errors that carry one, and of those of a bucket's client.
        A path that is not there, not a folder or not permitted stays the OSError that it was. `SystemRefusal` of what
        `REMEDIES` has, and where a bucket is closed.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, InputError) and (said := _said_by_system(error)):
            reason, number = said
            raise failure(f'{what}: {reason}', number) from error
        raise


def failure(line: str, number: int | None) -> SystemFailure:
    """What the system has failed at; where its number of that is of `REMEDIES`, a refusal that says what to do."""
    if number in REMEDIES:
        return SystemRefusal(f'{line}; {REMEDIES[number]}, then start again')
    return SystemFailure(line)


def _said_by_system(error: BaseException) -> tuple[str, int | None] | None:
    """(reason, number) in an error or its causes; None where it is not the system's, or is about a path."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's, of any type
        number = int(code[1])
        if number in REMEDIES:
            return os.strerror(number), number
        error = OSError(number, os.strerror(number))
    if isinstance(error, OSError):
        of_path = isinstance(error, _PATH_ERRORS) or error.errno in _PATH_ERROR_NUMBERS
        return None if of_path else (error.strerror or error_line(error), error.errno)
    if reason := bucket_reason(error):
        return reason, errno.EACCES if is_closed(error) else None
    return _said_by_system(error.__cause__) if error.__cause__ else None


def bucket_reason(error: BaseException) -> str:
    """What an error says of a bucket that is closed or out of reach; '' where it is not of a bucket's client."""
    if type(error).__module__.partition('.')[0] in _BUCKET_CLIENTS:
        return f'{type(error).__name__}: {error_line(error)}'
    frames = (
        traceback.walk_tb(error.__traceback__) if isinstance(error, OSError) and error.errno is None else ()
    )
    raised_in = [frame.f_globals.get('__name__', '') for frame, _ in frames][-1:]
    return error_line(error) if any(name.startswith('gcsfs.') for name in raised_in) else ''


def is_closed(error: BaseException) -> bool:
    """Whether `bucket_reason` is that a bucket may not be used: trying again is of no use."""
    return getattr(error, 'code', None) in (401, 403) or str(error).startswith('Forbidden')


def expand_user(text: str) -> str:
    """'~' at the beginning of a path for the user's folder, also behind the mark of `tfds:NAME@` and `perplexity:`."""
    match = re.fullmatch(r'(\s*|\s*tfds:[^@]+@|\s*perplexity:)(~.*)', text, re.DOTALL)
    return match[1] + os.path.expanduser(match[2]) if match else text


def check_place(path: str | os.PathLike, *, folder: bool) -> None:
    """Refuses a place that cannot be written, and leaves nothing there: what is wrong with it shows before the work.

    Args:
      path: of a folder or file that may not exist yet, local or `gs://...`.
      folder: whether it is to be a folder.

    Raises:
      InputError: something else is in the way, or nothing may be made there.
    """
    text = os.fspath(path)
    enable_bucket(text)
    if '://' in text:
        return
    place = os.path.abspath(text)
    if os.path.exists(place) and os.path.isdir(place) != folder:
        raise InputError(
            f'{text} is a {"file" if folder else "folder"}; name a {"folder" if folder else "file"}'
        )
    if os.path.isfile(place) and os.access(place, os.W_OK):
        return
    above = place
    while not os.path.lexists(above) or (above == place and not folder):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise InputError(f'{text} cannot be written: {above} is no folder')
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f'{text} cannot be written: no permission to write in {above}')


def check_new(path) -> None:
    """Refuses a place where something is already: what is made there appears whole, and replaces nothing.

    Args:
      path: an `epath.Path`, local or `gs://...`; an empty folder will do.

    Raises:
      InputError: there is something.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f'{path} exists; give a new one, or remove it first')


def write_atomically(path, data: bytes | str) -> None:
    """Writes a whole file: beside and renamed on a local disk, one object in a bucket; never half.

    Args:
      path: an `epath.Path`, local or `gs://...`; folders above it are made.
      data: bytes, or text to write as UTF-8.

    Raises:
      SystemFailure: it cannot, `SystemRefusal` where the disk is full; what stood at `path` still does.
    """
    data = data.encode() if isinstance(data, str) else data
    with system_failures(f'{path} cannot be written'):
        if '://' in os.fspath(path):
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f'.{path.name}.{os.getpid()}.partial'
        try:
            with open(beside, 'wb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a power cut may leave the new name without its content
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


class AppendedFile:
    """A local file that grows; what was appended is in the system's hands when `append` returns."""

    def __init__(self, path: os.PathLike):
        self._path = path
        # Without a buffer: what a full disk has refused would be written again, and fail again, when Python ends.
        self._file = open(path, 'ab', buffering=0)  # noqa: SIM115

    def append(self, data: bytes) -> None:
        """Raises SystemFailure where it cannot be written; a part of it may have been."""
        with system_failures(f'{self._path} cannot be written'):
            while data:
                data = data[self._file.write(data) :]

    def sync(self) -> None:
        """Returns when it is on the disk, where a power cut cannot take it."""
        with system_failures(f'{self._path} cannot be written'):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is written behind it."""
        self._file.close()


@contextlib.contextmanager
def parents_made(path) -> Iterator[None]:
    """Makes the folders above a local path; those that were not there go again where nothing came of it."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody else's file is in it
                folder.rmdir()
        raise


@contextlib.contextmanager
def new_folder(path) -> Iterator:
    """A folder that appears whole or not at all: filled under another name beside it, and renamed at the end.

    In a bucket, which cannot rename, it is filled in place; write last what makes it complete.

    Args:
      path: an `epath.Path`, which must not exist yet, or be empty.

    Yields:
      The folder to write into.

    Raises:
      InputError: there is something at `path` already.
    """
    check_new(path)
    if '://' in os.fspath(path):
        yield path
        return
    beside = path.parent / f'.{path.name}.{os.getpid()}.partial'
    for other in path.parent.glob(f'.{path.name}.*.partial') if path.parent.exists() else ():
        logger.warning(
            '%s is what a killed command has left, if none writes %s now; it may be removed', other, path
        )
    with parents_made(path):
        beside.mkdir()
        try:
            yield beside
            try:
                os.replace(beside, path)  # an empty folder gives way
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise InputError(
                    f'{path} has been written by another command meanwhile; give a new one'
                ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def prefetch(jobs: Iterable[Callable[[], T]], threads: int = 2) -> Iterator[T]:
    """Results of the jobs in their order, the next few computed while one is used."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[T]] = []
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) >= threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
