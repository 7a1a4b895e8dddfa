"""Checkpoints of a run, by Orbax: written in the background, kept N at a time, restored onto any mesh.

Restoring passes over a step that was damaged after its commit (`integrity`), for the one before.
"""

import contextlib
import json
import logging
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from llama_jax.checkpoint.failures import told_once
from llama_jax.checkpoint.integrity import absolute, find_damage, record_files
from llama_jax.checkpoint.weights import CHUNK_BYTES, open_params
from llama_jax.errors import InputError, SystemFailure, error_line
from llama_jax.runtime import gather_texts, is_main_process, refused_by_all, sync_processes
from llama_jax.storage import enable_bucket, failure, system_failures
from llama_jax.types import PyTree

logger = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints under one directory, `directory/STEP/{state,metadata}`."""

    def __init__(self, directory: epath.PathLike, keep: int = 3, verify: bool = True):
        """Opens or creates the directory; what a killed save left goes in the background, before the next save.

        Args:
          directory: local or `gs://...`.
          keep: how many of the newest steps stay; 0: all.
          verify: compare the content of every file with what was written before a step is restored; else sizes alone.

        Raises:
          InputError: keep is negative, or the directory is of a bucket that cannot be reached.
        """
        if keep < 0:
            raise InputError(
                f'checkpoints to keep: {keep}; give the number of the newest that stay, or 0 for all'
            )
        enable_bucket(directory)
        self._directory = absolute(directory)
        self._verify = verify
        self._saving: int | None = None
        self._at_end_of_save = contextlib.ExitStack()
        if is_main_process():
            self._directory.mkdir(parents=True, exist_ok=True)
        sync_processes('checkpoint directory')
        # Processes that are named wait for each other through the coordinator. Else Orbax has them do so by collectives
        # on the devices, which must not run beside a training step's.
        processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep or None,
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._record_files),
            ),
        )

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied, so that their buffers may be donated.

        Args:
          step: the updates that `state` has had.
          state: a tree of arrays.
          metadata: JSON values that must be restored with the state (rows consumed, the run's configuration).

        Raises:
          SystemFailure: this one or the one before cannot be written; those of before stay.
        """
        self.wait()
        self._saving = step
        self._at_end_of_save.enter_context(told_once())
        with self._failures_of(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state, jax.tree.map(_save_args, state)),
                    metadata=ocp.args.JsonSave(metadata),
                ),
            )

    def _failures_of(self, step: int) -> contextlib.AbstractContextManager[None]:
        return system_failures(
            f'the checkpoint of step {step} under {self._directory} cannot be written, those of before stay'
        )

    def _record_files(self) -> None:
        if is_main_process() and self._saving is not None:
            record_files(self._directory, self._saving)

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
                restored, damage = _restore(self._directory / str(step), abstract_state)
                if not damage:
                    return step, *restored
            self._pass_over(step, damage)
        if steps:
            raise InputError(
                f'all checkpoints under {self._directory} are damaged (steps {steps[::-1]}, renamed to STEP.damaged); '
                'start in a new place'
            )
        return None

    def _find_damage(self, step: int) -> str:
        """What differs from what was recorded at commit; '' where nothing does. Each process looks at its share."""
        share = (jax.process_index(), jax.process_count())
        with refused_by_all():
            damage = find_damage(self._directory / str(step), hashes=self._verify, share=share)
        return next(filter(None, gather_texts(damage)), '')

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

    def raise_failure(self) -> None:
        """Raises SystemFailure where the save under way has failed; waits for nothing."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is committed; raises SystemFailure, once, where it cannot be."""
        if self._saving is None:
            return
        try:
            with self._failures_of(self._saving):
                self._manager.wait_until_finished()
        finally:
            self._saving = None
            self._at_end_of_save.close()

    def check_latest(self) -> None:
        """Returns when the newest step is found to be what was written, and opens as a checkpoint.

        Raises:
          SystemFailure: it is not.
        """
        self.wait()
        step = self._manager.latest_step()
        if step is None:
            return
        folder = self._directory / str(step)
        damage = self._find_damage(step)
        if not damage:
            try:
                open_params(folder)
            except InputError as error:
                damage = str(error)
        if damage:
            raise SystemFailure(f'checkpoint {folder} was written, and cannot be read back: {damage}')

    def close(self) -> None:
        """Commits what is being saved and lets go of the directory."""
        self.wait()
        self._manager.close()


def restore_step(step_folder: epath.PathLike, abstract_state: PyTree) -> tuple[int, PyTree, dict[str, Any]]:
    """(step, state, metadata) of one step of any run, which may go on meanwhile: nothing in its folder is touched.

    Raises:
      InputError: the step is damaged, or holds another state than asked for.
    """
    folder = absolute(step_folder)
    restored, damage = _restore(folder, abstract_state)
    if damage:
        raise InputError(f'checkpoint {folder} is damaged: {damage}')
    return int(folder.name), *restored


def _restore(folder: epath.Path, abstract_state: PyTree) -> tuple[Any, str]:
    """((state, metadata), ''), or what of it is broken; each process reads its slices, all get one answer."""
    restored, damage = None, ''
    with refused_by_all(), told_once():
        try:  # by the handlers, as the manager would wait for processes that have failed
            restored = (
                ocp.StandardCheckpointHandler().restore(
                    folder / 'state', args=ocp.args.StandardRestore(abstract_state)
                ),
                ocp.JsonCheckpointHandler().restore(folder / 'metadata', args=ocp.args.JsonRestore()),
            )
        except Exception as error:  # Orbax and TensorStore raise many kinds
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            line = f'{type(cause).__name__}: {error_line(cause)}'
            if _is_damage(error):
                damage = line
            elif isinstance(error, ValueError):
                raise InputError(f'checkpoint {folder} cannot be restored: {line}') from error
            elif type(error) is Exception or isinstance(cause, OSError):  # as Orbax tells of reads that fail
                number = getattr(cause, 'errno', None)
                raise failure(f'checkpoint {folder} cannot be read: {line}', number) from error
            else:
                raise
    return restored, next(filter(None, gather_texts(damage)), '')


def _save_args(leaf: Any) -> ocp.SaveArgs:
    """Cuts a large leaf into chunks on disk, stacked layers apart, so that it can be read in pieces."""
    is_large_stack = leaf.ndim > 2 and leaf.nbytes > CHUNK_BYTES
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if is_large_stack else ())


def _is_damage(error: BaseException) -> bool:
    """Whether it tells of broken content; what failed for another reason (memory, network, shapes) is still good."""
    broken = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
    broken = broken or any(words in str(error) for words in ('DATA_LOSS', 'ZSTD_decompress'))
    return broken or (error.__cause__ is not None and _is_damage(error.__cause__))
