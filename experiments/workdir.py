"""Whose run a workdir holds: what its checkpoints depend on is recorded, and another run is refused."""

import atexit
import json
import logging
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from experiments.launch import flatten
from llama_jax import lock, runtime, storage
from llama_jax.checkpoint.integrity import absolute
from llama_jax.checkpoint.model_file import CHECKPOINTS
from llama_jax.types import InputError, error_line

CONFIG_FILE = 'config.json'
TOKENIZER_FILE = 'tokenizer.model'

logger = logging.getLogger('llama_jax.workdir')

# What a workdir's checkpoints depend on. All else (mesh, lengths, logging, remat) may change between launches.
_IDENTITY = (
    'base_checkpoint', 'seed', 'model.preset', 'model.vocab_size', 'model.dtype', 'data.', 'train.batch_size',
    'train.z_loss', 'optimizer.',
)  # fmt: skip


def hold_folder(
    folder: epath.Path, *, held: bool = False, only_existing: bool = False, beside: bool = False
) -> bool:
    """Refuses a folder that another run writes into; until this process ends no other may.

    Args:
      folder: made where it is missing.
      held: it is already.
      only_existing: where it is missing, do nothing yet: what is refused must leave no trace.
      beside: it is made when it is complete, and must not be there before.

    Returns:
      Whether it is held; process 0 does that for all.
    """
    with runtime.refused_by_all():
        if runtime.is_main_process() and not held and (not only_existing or folder.exists()):
            with storage.system_failures(f'{folder} cannot be held'):
                atexit.register(lock.hold(folder, beside=beside))
            return True
    return held


def read_record(workdir: epath.Path) -> dict[str, Any] | None:
    """What `record_run` wrote of the run here; None where none has begun.

    Each checkpoint keeps a copy, which serves where config.json is missing or damaged; the latter is said in a warning.

    Raises:
      InputError: it is damaged, and there is no copy.
    """
    file, reason = workdir / CONFIG_FILE, ''
    if file.exists():
        record, reason = _parse_record(file)
        if record:
            return record
    checkpoints = workdir / CHECKPOINTS
    found = [path for path in checkpoints.iterdir() if path.name.isdigit()] if checkpoints.is_dir() else []
    for step in sorted(found, key=lambda path: int(path.name), reverse=True):
        record, _ = _parse_record(step / 'metadata/metadata')
        if record:
            if reason:
                logger.warning(
                    '%s is damaged (%s); the copy in checkpoint %s is used', file, reason, step.name
                )
            return record
    if reason:
        raise InputError(
            f'{file} is damaged ({reason}), and no checkpoint has a copy; restore it, or choose a new --workdir'
        )
    return None


def _parse_record(file: epath.Path) -> tuple[dict[str, Any] | None, str]:
    """(the record, ''), or (None, what is wrong with it)."""
    kinds = {'config': dict, 'base_checkpoint': str, 'data_fingerprint': str}
    try:
        record = json.loads(file.read_bytes())
        for key, kind in kinds.items():
            if not isinstance(record[key], kind):
                return None, f'{key} is {type(record[key]).__name__}, not {kind.__name__}'
        flatten(record['config'])  # nested deep it would fail later
        return record, ''
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError) as error:
        return None, f'{type(error).__name__}: {error_line(error)}'


def check_workdir(workdir: epath.Path, config: ConfigDict, base_checkpoint: str) -> None:
    """Refuses a workdir of another run, naming the first key that differs."""
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f'--workdir={workdir} is a file; name a folder, which is made where it is missing')
    absolute(workdir / CHECKPOINTS)  # refuses a path that checkpoints cannot be kept under
    if not (record := read_record(workdir)):
        return
    before = flatten(record['config']) | {'base_checkpoint': record['base_checkpoint']}
    now = flatten(json.loads(config.to_json())) | {'base_checkpoint': base_checkpoint}
    for key in sorted(set(before) | set(now)):
        if key.startswith(_IDENTITY) and before.get(key) != now.get(key):
            flag = '--checkpoint' if key == 'base_checkpoint' else f'--config.{key}'
            raise InputError(
                f'workdir {workdir} belongs to another run: {flag} was {before.get(key)!r} and is '
                f'{now.get(key)!r}; restore it, or choose a new --workdir'
            )


def check_data(workdir: epath.Path, fingerprint: str) -> None:
    """Refuses to go on where the documents themselves have changed."""
    record = read_record(workdir)
    if record and (before := record['data_fingerprint']) != fingerprint:
        raise InputError(
            f'the data of workdir {workdir} have changed since it was started (fingerprint {before[:12]}, now '
            f'{fingerprint[:12]}): restore the files of --config.data.train and its tokenizer.model, or choose a new '
            '--workdir'
        )


def check_same_data(fingerprint: str) -> None:
    """Refuses hosts whose copies of the documents differ."""
    first, *others = runtime.gather_texts(fingerprint)
    for process, other in enumerate(others, start=1):
        if other != first:
            raise InputError(
                f'process {process} finds other documents in --config.data.train than process 0 (fingerprint '
                f'{other[:12]}, not {first[:12]}); give all hosts the same files'
            )


def record_run(
    workdir: epath.Path, config: ConfigDict, base_checkpoint: str, fingerprint: str
) -> dict[str, Any]:
    """Writes config.json and returns what it holds."""
    record = {
        'config': json.loads(config.to_json()),
        'base_checkpoint': base_checkpoint,
        'data_fingerprint': fingerprint,
    }
    if runtime.is_main_process():
        storage.write_atomically(workdir / CONFIG_FILE, json.dumps(record, indent=2) + '\n')
    return record


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether there is something to resume from; process 0 looks, for all."""
    checkpoints = workdir / CHECKPOINTS
    found = runtime.is_main_process() and checkpoints.exists()
    found = found and any(path.name.isdigit() for path in checkpoints.iterdir())
    return bool(runtime.from_main_process(np.array(found)))
