"""Checkpoints of a run, by Orbax: written in the background, kept N at a time, restored onto any mesh.

A step's folder is complete or absent: Orbax writes beside and renames, and in a bucket, which cannot rename, it marks
the step with `commit_success.txt` and passes over those without. What it cannot see is a folder damaged *after*
its commit (a full disk, a broken copy), so each commit carries a list of its files' sizes, and restoring passes over a
step that no longer matches, for the one before.
"""

import json
import logging
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from llama_jax.runtime import enable_bucket, is_main_process, sync_processes
from llama_jax.types import InputError, Params, PyTree

logger = logging.getLogger(__name__)

_SIZES = 'file_sizes.json'


class Checkpointer:
    """The checkpoints under one directory, `directory/STEP/{state,metadata}`."""

    def __init__(self, directory: epath.PathLike, keep: int = 3):
        """Opens or creates the directory, and clears away what a killed save left.

        Args:
          directory: local or `gs://...`.
          keep: how many of the newest steps stay.
        """
        enable_bucket(directory)
        self._directory = _absolute(directory)
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._record_sizes),
            ),
        )

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied, so that their buffers may be donated.

        Args:
          step: the updates that `state` has had.
          state: a tree of arrays.
          metadata: JSON values that must be restored with the state (rows consumed, the run's configuration).
        """
        self._manager.wait_until_finished()
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)),
        )

    def _record_sizes(self) -> None:
        """Runs in Orbax's thread just before the commit, when the arrays are written; so the list is part of it."""
        if is_main_process():
            temporary = f'{self._saving}.orbax-checkpoint-tmp'
            for folder in self._directory.iterdir():
                if folder.name == str(self._saving) or folder.name.startswith(temporary):
                    (folder / _SIZES).write_text(json.dumps(_file_sizes(folder)))

    def restore_latest(self, abstract_state: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest undamaged step, restored onto the shardings of `abstract_state`.

        Damaged steps are renamed to `STEP.damaged`, with a warning that says so.

        Returns:
          (step, state, metadata), or None where nothing was saved yet.

        Raises:
          InputError: steps were saved and all of them are damaged, or the newest holds another state than asked for.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            damage = self._find_damage(step)
            if not damage:
                try:
                    restored = self._manager.restore(
                        step,
                        args=ocp.args.Composite(
                            state=ocp.args.StandardRestore(abstract_state), metadata=ocp.args.JsonRestore()
                        ),
                    )
                    return step, restored['state'], restored['metadata']
                except Exception as error:  # Orbax and TensorStore raise many kinds
                    reason = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
                    if not _is_damage(error):
                        if isinstance(error, ValueError):
                            folder = self._directory / str(step)
                            raise InputError(f'checkpoint {folder} cannot be restored: {reason}') from error
                        raise
                    damage = reason
            self._pass_over(step, damage)
        if steps:
            raise InputError(
                f'all checkpoints under {self._directory} are damaged (steps {steps[::-1]}, renamed to STEP.damaged); '
                'start in a new --workdir'
            )
        return None

    def _find_damage(self, step: int) -> str:
        """What differs from the sizes recorded at commit; '' where nothing does. All processes get one answer."""
        damage = _compare_sizes(self._directory / str(step)) if is_main_process() else ''
        if jax.process_count() > 1:
            message = np.frombuffer(damage.encode()[:512].ljust(512), dtype=np.uint8)
            damage = bytes(multihost_utils.broadcast_one_to_all(message)).decode(errors='replace').strip()
        return damage

    def _pass_over(self, step: int, damage: str) -> None:
        logger.warning(
            'checkpoint of step %d is damaged (%s); passing over it for the one before', step, damage
        )
        if is_main_process():
            target = self._directory / f'{step}.damaged'
            if target.exists():
                target.rmtree()
            (self._directory / str(step)).rename(target)
        sync_processes(f'passed over {step}')
        self._manager.reload()

    def wait(self) -> None:
        """Returns when the last save is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Commits what is being saved and lets go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()


def _absolute(directory: epath.PathLike) -> epath.Path:
    """The directory as Orbax takes it: from the root, where it is local."""
    text = os.fspath(directory)
    return epath.Path(text if '://' in text else os.path.abspath(text))


def _is_damage(error: BaseException) -> bool:
    """Whether it tells of broken content; what failed for another reason (memory, network, shapes) is still good."""
    broken = isinstance(error, json.JSONDecodeError | UnicodeDecodeError) or 'DATA_LOSS' in str(error)
    return broken or (error.__cause__ is not None and _is_damage(error.__cause__))


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


def _compare_sizes(step_folder: epath.Path) -> str:
    """The first difference from what was committed; '' where there is none."""
    try:
        recorded = json.loads((step_folder / _SIZES).read_text())
    except (OSError, ValueError):
        return f'{_SIZES} is missing or unreadable'
    found = _file_sizes(step_folder)
    for name, size in sorted(recorded.items()):
        if found.get(name) != size:
            return f'{name} has {found.get(name, "no")} bytes, {size} were written'
    return ''


def restore_params(directory: epath.PathLike, abstract_params: Params) -> tuple[int, Params]:
    """The weights alone of the newest step, cast and placed as `abstract_params` says.

    Raises:
      InputError: the directory holds no checkpoint, or weights of other shapes.
    """
    folder = _absolute(directory)
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    steps = sorted(int(path.name) for path in found if ocp.utils.is_checkpoint_finalized(path))
    if not steps:
        raise InputError(f'no checkpoint under {folder}: it should hold folders named by step')
    undamaged = [step for step in steps if not _compare_sizes(folder / str(step))]
    if not undamaged:
        raise InputError(f'all checkpoints under {folder} are damaged (steps {steps})')
    step_folder = folder / str(undamaged[-1])
    target = {'params': abstract_params}
    restore = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            # Before anything is read: where shapes differ Orbax would stop half-way, its other reads left hanging.
            saved = checkpointer.metadata(step_folder / 'state').item_metadata.tree['params']
            if difference := _compare_shapes(saved, abstract_params):
                raise InputError(f'checkpoint {step_folder} cannot be restored: {difference}')
            restored = checkpointer.restore(step_folder / 'state', args=restore)
        except InputError:
            raise
        except (ValueError, TypeError, FileNotFoundError, KeyError) as error:
            reason = (str(error).splitlines() or [''])[0][:300]
            raise InputError(f'checkpoint {step_folder} cannot be restored: {reason}') from error
    return undamaged[-1], restored['params']


def _compare_shapes(saved: PyTree, wanted: PyTree) -> str:
    """The first weight that is missing or of another shape; '' where there is none."""
    shapes = {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        name = _name(path)
        if name not in shapes:
            return f'it has no weight {name}'
        if shapes[name] != tuple(leaf.shape):
            return f'its weight {name} has shape {shapes[name]}, the model {tuple(leaf.shape)}'
    return ''


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')
