"""Places of files: local paths and gs:// buckets, files and folders that appear whole, reading ahead."""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from llama_jax.types import InputError

T = TypeVar('T')


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

    # Otherwise gcsfs answers from what a folder held at first; TensorStore and other processes write there too.
    for protocol in ('gs', 'gcs'):
        fsspec.config.conf.setdefault(protocol, {})['use_listings_cache'] = False


def write_atomically(path, data: bytes | str) -> None:
    """Writes a whole file: beside and renamed on a local disk, one object in a bucket; never half.

    Args:
      path: an `epath.Path`, local or `gs://...`; folders above it are made.
      data: bytes, or text to write as UTF-8.
    """
    data = data.encode() if isinstance(data, str) else data
    if '://' in os.fspath(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f'.{path.name}.{os.getpid()}.partial'
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f'{path} exists; give a new one, or remove it first')
    if '://' in os.fspath(path):
        yield path
        return
    beside = path.parent / f'.{path.name}.{os.getpid()}.partial'
    beside.mkdir(parents=True)
    try:
        yield beside
        if path.exists():
            path.rmdir()
        os.replace(beside, path)
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
