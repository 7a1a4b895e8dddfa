"""`config.json` of a workdir: what a run was begun with. Checkpoints keep copies of it."""

import json
import logging
from typing import Any

from etils import epath

from experiments.run.config_file import flatten
from llama_jax import pretrained
from llama_jax.checkpoint.model_file import CHECKPOINTS
from llama_jax.errors import InputError, error_line

CONFIG_FILE = 'config.json'

logger = logging.getLogger('llama_jax.record')

# What config.json must hold, what it may, what of its configuration is read again, and of which kind each is.
_RECORDED = {'config': dict, 'base_checkpoint': str, 'data_fingerprint': str}
_RECORDED_LATER = {'unit_bytes': int, 'fork': dict, 'history': list}
_OF_CONFIG = {
    'seed': int, 'data.train': str, 'data.weights': str, 'data.skip': str, 'data.format': str, 'data.seq_len': int,
    'train.batch_size': int,
}  # fmt: skip
_CHANGE = {'step', 'key', 'before', 'after'}
_FORK = {'from': str, 'workdir': str, 'step': int}


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


def recorded_config(opened: pretrained.Checkpoint) -> dict[str, Any] | None:
    """The run's keys by dotted name that an opened checkpoint is of; None where no run says how it was trained.

    Raises:
      InputError: as `read_record`.
    """
    record = read_record(opened.place) if opened.format == 'orbax' else None
    return record and flatten(record['config'])


def _parse_record(file: epath.Path) -> tuple[dict[str, Any] | None, str]:
    """(the record, ''), or (None, what is wrong with it)."""
    try:
        record = json.loads(file.read_bytes())
        if missing := [key for key in _RECORDED if key not in record]:
            return None, f'it has no {missing[0]}'
        flat = flatten(record['config'])  # nested deep it would fail later
        for key, kind in (_RECORDED | _RECORDED_LATER | _OF_CONFIG).items():
            values = flat if '.' in key or key == 'seed' else record
            value = values.get(key, kind())
            if not isinstance(value, kind) or isinstance(value, bool):
                return None, f'{key} is {type(value).__name__}, not {kind.__name__}'
        for change in record.get('history', ()):
            if not (isinstance(change, dict) and change.keys() >= _CHANGE and type(change['step']) is int):
                return None, 'history holds what is no change'
        for key, kind in _FORK.items() if 'fork' in record else ():
            if not isinstance(record['fork'].get(key), kind):
                return None, f'fork has no {key}'
        return record, ''
    except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return None, f'{type(error).__name__}: {error_line(error)}'
