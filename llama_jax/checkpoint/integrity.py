"""Whether a committed step is still what was committed.

A step's folder is complete or absent: Orbax writes beside and renames, and in a bucket, which cannot rename, it marks
the step with `commit_success.txt` and passes over those without. What it cannot see is a folder damaged *after* its
commit (a flipped bit, a full disk, a broken copy), so each commit carries a list of its files: sizes and CRC-32C, the
checksum that a bucket keeps of every object anyway, so that there nothing is read again.
"""

import base64
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import google_crc32c
from etils import epath

from llama_jax.errors import InputError, SystemFailure
from llama_jax.storage import system_failures

_RECORD = 'files.json'
_SIZES = 'file_sizes.json'  # what versions before wrote: sizes alone
_BLOCK_BYTES = 1 << 18  # stays in a core's cache between reading and hashing
_THREADS = 16


def record_files(directory: epath.Path, step: int) -> None:
    """Call it just before the commit, when the arrays are written, so that the list is part of it.

    Raises:
      SystemFailure: what the processes wrote was not put together; the step must not be committed.
    """
    temporary = f'{step}.orbax-checkpoint-tmp'
    for folder in directory.iterdir():
        if folder.name == str(step) or folder.name.startswith(temporary):
            files = _files(folder)
            if 'state/manifest.ocdbt' not in files and any('ocdbt.process_' in name for name in files):
                raise SystemFailure(f'{folder}: the parts that were written were not put together')
            checksums = _checksums(folder, files)
            record = {
                name: {'bytes': files[name]['bytes'], 'crc32c': checksum}
                for name, checksum in checksums.items()
            }
            (folder / _RECORD).write_text(json.dumps(record))


def find_damage(step_folder: epath.Path, *, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> str:
    """The first difference from what was committed; '' where there is none.

    Args:
      step_folder: of one step.
      hashes: whether to compare contents too; else the files' sizes alone.
      share: (which, of how many) parts of the contents to look at, where several processes divide them.

    Raises:
      SystemFailure: a file cannot be read, which says nothing of what is in it.
    """
    with system_failures(f'{step_folder} cannot be read'):
        record = _read_record(step_folder)
        if record is None:
            return f'{_RECORD} is missing or unreadable'
        found = _files(step_folder)
        for name, entry in sorted(record.items()):
            size = found.get(name, {}).get('bytes', 'no')
            if size != entry['bytes']:
                return f'{name} has {size} bytes, {entry["bytes"]} were written'
        if not hashes:
            return ''
        hashed = sorted(name for name in record if record[name]['crc32c'])
        which, number = share
        part = sorted(hashed, key=lambda name: record[name]['bytes'], reverse=True)[which::number]
        for name, checksum in _checksums(step_folder, {name: found[name] for name in part}).items():
            if checksum != record[name]['crc32c']:
                return f'{name} has not the content that was written'
    return ''


def _read_record(step_folder: epath.Path) -> dict[str, dict[str, Any]] | None:
    """{path: its bytes and checksum} as committed, of a version before without checksums; None where it is broken."""
    try:
        if (step_folder / _RECORD).exists():
            record = json.loads((step_folder / _RECORD).read_text())
            found = {
                name: {'bytes': entry['bytes'], 'crc32c': entry['crc32c']} for name, entry in record.items()
            }
        else:
            sizes = json.loads((step_folder / _SIZES).read_text())
            found = {name: {'bytes': size, 'crc32c': ''} for name, size in sizes.items()}
        are_sound = all(
            name.isprintable() and type(entry['bytes']) is int and isinstance(entry['crc32c'], str)
            for name, entry in found.items()
        )
        return found if are_sound else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _files(step_folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Bytes of every file of a step's items, by path, in a bucket with the checksum that it keeps.

    Files beside the items are Orbax's own and still change.
    """
    root = os.fspath(step_folder)
    if '://' in root:
        system, folder = fsspec.url_to_fs(root)
        found = system.find(folder, detail=True)
        files = {
            os.path.relpath(path, folder): {'bytes': entry['size'], 'crc32c': entry.get('crc32c')}
            for path, entry in found.items()
        }
    else:
        files = {
            os.path.relpath(path, root): {'bytes': os.stat(path).st_size}
            for folder, _, names in os.walk(root)
            for path in (os.path.join(folder, name) for name in names)
        }
    return {name: entry for name, entry in files.items() if '/' in name}


def _checksums(step_folder: epath.Path, files: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The CRC-32C of each of these files, as buckets write it; those that the bucket has told are not read."""
    unknown = [name for name, entry in files.items() if not entry.get('crc32c')]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        computed = pool.map(_checksum, (step_folder / name for name in unknown))
        known = {name: entry['crc32c'] for name, entry in files.items() if entry.get('crc32c')}
        return known | dict(zip(unknown, computed, strict=True))


def _checksum(path: epath.Path) -> str:
    value = 0
    with open(path, 'rb', buffering=0) if '://' not in os.fspath(path) else path.open('rb') as file:
        while block := file.read(_BLOCK_BYTES):
            value = google_crc32c.extend(value, block)  # without Python's lock
    return base64.b64encode(value.to_bytes(4, 'big')).decode()


def absolute(directory: epath.PathLike) -> epath.Path:
    """The directory as Orbax takes it: from the root, where it is local.

    Raises:
      InputError: Orbax and TensorStore would take a character of it for something else, and write or look elsewhere.
    """
    text = os.fspath(directory)
    if '://' not in text:
        text = os.path.realpath(text)
    if wrong := sorted(set(_special_characters(text))):
        raise InputError(
            f'checkpoints cannot be kept under {text!r}, whose path has {" ".join(wrong)}; choose one without '
            '* ? [ and backslashes'
        )
    return epath.Path(text)


def _special_characters(text: str) -> Iterable[str]:
    return (
        repr(character) for character in text if character in '*?[\\\0' or '\ud800' <= character <= '\udfff'
    )
