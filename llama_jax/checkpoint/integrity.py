"""Whether a committed step is still what was committed.

A step's folder is complete or absent: Orbax writes beside and renames, and in a bucket, which cannot rename, it marks
the step with `commit_success.txt` and passes over those without. What it cannot see is a folder damaged *after* its
commit (a full disk, a broken copy), so each commit carries a list of its files' sizes.
"""

import json
import os

from etils import epath

_SIZES = 'file_sizes.json'


def record_sizes(directory: epath.Path, step: int) -> None:
    """Call it just before the commit, when the arrays are written, so that the list is part of it."""
    temporary = f'{step}.orbax-checkpoint-tmp'
    for folder in directory.iterdir():
        if folder.name == str(step) or folder.name.startswith(temporary):
            (folder / _SIZES).write_text(json.dumps(_file_sizes(folder)))


def _file_sizes(step_folder: epath.Path) -> dict[str, int]:
    """Bytes of every file of a step's items, by path. Files beside the items are Orbax's own and still change."""
    sizes = {}
    folders = [path for path in step_folder.iterdir() if path.is_dir()]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            else:
                sizes[str(path.relative_to(step_folder))] = path.stat().length
    return sizes


def find_damage(step_folder: epath.Path) -> str:
    """The first difference from what was committed; '' where there is none."""
    try:
        recorded = sorted(json.loads((step_folder / _SIZES).read_text()).items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return f'{_SIZES} is missing or unreadable'
    found = _file_sizes(step_folder)
    for name, size in recorded:
        if found.get(name) != size:
            return f'{name} has {found.get(name, "no")} bytes, {size} were written'
    return ''


def absolute(directory: epath.PathLike) -> epath.Path:
    """The directory as Orbax takes it: from the root, where it is local."""
    text = os.fspath(directory)
    return epath.Path(text if '://' in text else os.path.abspath(text))
