"""Whose run a workdir holds: what its checkpoints depend on is recorded, and another run is refused."""

import atexit
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from experiments.launch import flags_named
from experiments.run.config_file import flatten
from experiments.run.data_schedule import parse_schedule
from experiments.run.record import CONFIG_FILE, read_record
from llama_jax import lock, runtime, storage
from llama_jax.checkpoint.integrity import absolute
from llama_jax.checkpoint.model_file import CHECKPOINTS, MODEL_FILE, read_config
from llama_jax.checkpoint.weights import check_step, latest_step
from llama_jax.data.units import UNIT_BYTES
from llama_jax.errors import InputError, did_you_mean, refusals_of

TOKENIZER_FILES = ('tokenizer.model', 'tokenizer.json')
# What runs write once they have begun, and what stands beside the weights of Meta's format.
_LEFT_BY_RUNS = (
    'metrics.jsonl', 'report.json', 'loss.png', 'base.json', 'preferences.png', 'reference.npz',
    'reward_over_kl.png', 'params.json',
)  # fmt: skip

logger = logging.getLogger('llama_jax.workdir')

# What may change between launches: mesh, lengths, measuring, logging. All else is in a workdir's checkpoints, whatever
# they are trained for.
_FREE = (
    'model.remat', 'model.unroll', 'model.attention', 'train.num_steps', 'train.num_epochs', 'train.num_microbatches',
    'train.loss_chunks', 'mesh.', 'checkpoint.', 'eval.', 'log.', 'rollout.mesh', 'rollout.axis_rules',
)  # fmt: skip

_ORDER = 'rows come in another order than in an unbroken run: some may be read twice or not at all'
_SCHEDULE = 'the learning rate follows the new schedule from this step on'
_NUMBERS = 'the steps before were taken with the old value'
# What of it a run may go on without, and what is then no longer exact. All else is in the weights, or in the
# optimiser's state.
_OVERRIDABLE = {
    'seed': _ORDER,
    'model.dtype': _NUMBERS,
    'data.train': _ORDER,
    'data.weights': _ORDER,
    'data.skip': _ORDER,
    'data.validation': 'validation losses before and after are of different rows',
    'data.validation_fraction': 'other documents validate than before, which may have been trained on',
    'data.text_key': _ORDER,
    'data.separator': _ORDER,
    'data.key_map': _ORDER,
    'data.on_error': _ORDER,
    'data.too_long': _ORDER,
    'data.loss_on': _NUMBERS,
    'data.seq_len': 'rows are of another length: those that are counted as consumed were of the old one',
    'train.batch_size': 'rows are counted on from those consumed, but steps of before had another number of them',
    'train.z_loss': _NUMBERS,
    'optimizer.learning_rate': _SCHEDULE,
    'optimizer.warmup_steps': _SCHEDULE,
    'optimizer.final_fraction': _SCHEDULE,
    'optimizer.beta1': _NUMBERS,
    'optimizer.beta2': _NUMBERS,
    'optimizer.eps': _NUMBERS,
    'optimizer.weight_decay': _NUMBERS,
    'optimizer.clip_norm': _NUMBERS,
    'data_fingerprint': _ORDER,
}

# What may change for the steps that are not taken yet.
_SCHEDULED = ('data.weights', 'data.skip')
# Keys that runs of before do not have, and what they mean without.
_ADDED = {'data.skip': ''}

Change = dict[str, Any]  # {'key', 'before', 'after'}


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


def check_overrides(overrides: Sequence[str], config: ConfigDict) -> None:
    """Refuses keys of --override that no run can go on without, or need no leave."""
    known = flatten(config)
    for key in overrides:
        given = f'--override={key}'
        if key not in known:
            raise InputError(f'{given}: unknown config key; {did_you_mean(key, known)}')
        if key.startswith(_FREE):
            raise InputError(f'{given}: a run may go on with another --config.{key} as it is; leave it out')
        if key not in _OVERRIDABLE:
            raise InputError(
                f"{given}: the weights or the optimiser's state are made for --config.{key}; start a new run from the "
                'weights by --checkpoint'
            )


def unit_bytes_of(workdir: epath.Path, fork: 'Fork | None' = None) -> int:
    """How text is cut in memory for a run; 0: not at all, as it was for those that do not say."""
    for folder in (workdir, fork.workdir if fork else None):
        if folder and (record := read_record(folder)):
            return record.get('unit_bytes', 0)
    return UNIT_BYTES


def check_workdir(
    workdir: epath.Path,
    config: ConfigDict,
    base_checkpoint: str,
    overrides: Sequence[str] = (),
    fork: str = '',
) -> list[Change]:
    """What --override lets differ from the run in a workdir; refuses another run's, naming the first key."""
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f'--workdir={workdir} is a file; name a folder, which is made where it is missing')
    absolute(workdir / CHECKPOINTS)  # refuses a path that checkpoints cannot be kept under
    if not (recorded := read_record(workdir)):
        _check_unused(workdir)
        return []
    changes = []
    for change in _differences(recorded, config, base_checkpoint):
        key = change['key']
        if key in _SCHEDULED:
            differs, taken = _first_differing_step(recorded, config), _newest_step(workdir)
            if differs > taken:
                logger.info('--config.%s is changed from step %d on, which is not taken yet', key, differs)
                continue
            if key not in overrides:
                raise InputError(
                    f'workdir {workdir} belongs to another run: --config.{key} was {change["before"]!r} and is '
                    f'{change["after"]!r}, which changes step {differs:.0f} of {taken} taken; change later steps '
                    f'alone, let it change by --override={key}, or choose a new --workdir'
                )
        if key in overrides:
            changes.append(change)
            continue
        flag = '--checkpoint' if key == 'base_checkpoint' else f'--config.{key}'
        leave = f', let it change by --override={key}' if key in _OVERRIDABLE else ''
        raise InputError(
            f'workdir {workdir} belongs to another run: {flag} was {change["before"]!r} and is '
            f'{change["after"]!r}; restore it{leave}, or choose a new --workdir'
        )
    origin = (recorded.get('fork') or {}).get('from', '')
    if fork and fork != origin:
        was = f'--fork was {origin!r} and is {fork!r}' if origin else f'it was not begun by --fork={fork}'
        raise InputError(f'workdir {workdir} belongs to another run: {was}; choose a new --workdir')
    return changes


def _check_unused(workdir: epath.Path) -> None:
    """Refuses a folder in which no run has begun, and where one would replace what is of something else."""
    if _newest_step(workdir) or (workdir / CHECKPOINTS / '0').exists():
        raise InputError(
            f'--workdir={workdir} holds a checkpoint and no {CONFIG_FILE} of a run; choose a new --workdir, and start '
            f'from its weights by --checkpoint={workdir}'
        )
    for name in _LEFT_BY_RUNS:
        if (workdir / name).exists():
            raise InputError(
                f'--workdir={workdir} has a {name}, though no run has begun there, and would lose it; move it away, or '
                'choose a new --workdir'
            )


def check_own_files(workdir: epath.Path, files: Mapping[str, bytes]) -> None:
    """Refuses to write a tokenizer over another one that no run has left there.

    Raises:
      InputError: names the file.
    """
    if read_record(workdir):
        return
    if (workdir / MODEL_FILE).exists():
        with refusals_of(f'--workdir={workdir}, in which no run has begun'):
            read_config(workdir)
        return  # a run was stopped as it began, and what it wrote is made anew
    for name, data in files.items():
        if (file := workdir / name).exists() and file.read_bytes() != data:
            raise InputError(
                f'--workdir={workdir} has another {name}, though no run has begun there, and would lose it; give it by '
                '--config.data.tokenizer, or choose a new --workdir'
            )


def _first_differing_step(recorded: dict[str, Any], config: ConfigDict) -> float:
    """The first step that reads other rows than it would have by the record."""
    before = flatten(recorded['config'])
    schedules = [
        parse_schedule(values.get('data.weights') or '', values.get('data.skip') or '')
        for values in (before, flatten(config))
    ]
    return schedules[0].first_difference(schedules[1])


def _newest_step(workdir: epath.Path) -> int:
    checkpoints = workdir / CHECKPOINTS
    found = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(name) for name in found if name.isdigit()), default=0)


def _differences(recorded: dict[str, Any], config: ConfigDict, base_checkpoint: str) -> list[Change]:
    before = flatten(recorded['config']) | {'base_checkpoint': recorded['base_checkpoint']}
    now = flatten(json.loads(config.to_json())) | {'base_checkpoint': base_checkpoint}
    return [
        {'key': key, 'before': before.get(key), 'after': now.get(key)}
        for key in sorted(set(before) | set(now))
        if not key.startswith(_FREE) and before.get(key, _ADDED.get(key)) != now.get(key, _ADDED.get(key))
    ]


def check_data(workdir: epath.Path, fingerprint: str, overrides: Sequence[str] = ()) -> list[Change]:
    """What differs of the documents themselves; refused where no --override is of the data."""
    recorded = read_record(workdir)
    if not recorded or (before := recorded['data_fingerprint']) == fingerprint:
        return []
    if any(key.startswith('data.') for key in overrides):
        return [{'key': 'data_fingerprint', 'before': before, 'after': fingerprint}]
    raise InputError(
        f'the data of workdir {workdir} have changed since it was started (fingerprint {before[:12]}, now '
        f'{fingerprint[:12]}): restore the files of --config.data.train and its tokenizer.model, let them change by '
        '--override=data.train, or choose a new --workdir'
    )


@dataclasses.dataclass(frozen=True)
class Fork:
    """Another run, from one of whose steps this one starts.

    Attributes:
      given: as it was.
      workdir: of the other run.
      step: the folder of the step.
      changes: what is set otherwise than there.
      fingerprint: of the documents there.
    """

    given: str
    workdir: epath.Path
    step: epath.Path
    changes: list[Change]
    fingerprint: str

    def changes_with(self, fingerprint: str) -> list[Change]:
        """`changes`, and that of the documents."""
        same = fingerprint == self.fingerprint
        of_data = {'key': 'data_fingerprint', 'before': self.fingerprint, 'after': fingerprint}
        return self.changes if same else [*self.changes, of_data]


def open_fork(given: str, workdir: epath.Path, config: ConfigDict) -> Fork:
    """--fork=WORKDIR[@STEP]; without a step the newest. Nothing there is touched.

    Raises:
      InputError: there is no such run or step, or it was trained with other sizes, tokenizer or optimiser.
    """
    place, at, step = given.rpartition('@')
    if not (at and step.isdigit()):
        place, step = given, ''
    storage.enable_bucket(place)
    origin = epath.Path(place)
    if origin == workdir:
        raise InputError(f'--fork={given} is --workdir itself; name the workdir of another run')
    recorded = read_record(origin)
    if not recorded:
        raise InputError(f'--fork={given}: {origin} is no workdir of a run, for it has no {CONFIG_FILE}')
    changes = [change for change in _differences(recorded, config, '') if change['key'] != 'base_checkpoint']
    for change in changes:
        if change['key'] not in _OVERRIDABLE:
            raise InputError(
                f'--fork={given} has {change["key"]} {change["before"]!r}, this run {change["after"]!r}; its state '
                f'fits no other: set --config.{change["key"]}={change["before"]}'
            )
    with flags_named('--fork'):
        found = check_step(origin / CHECKPOINTS / step) if step else latest_step(origin / CHECKPOINTS)
    return Fork(given, origin, found, changes, recorded['data_fingerprint'])


def check_same_fork(fork: Fork | None) -> None:
    """Refuses processes that see another newest step of a run that goes on: they would start from different states."""
    steps = runtime.gather_texts(str(fork.step) if fork else '')
    if fork and len(set(steps)) > 1:
        raise InputError(
            f'--fork={fork.given}: the processes find {" and ".join(sorted(set(steps)))} as its newest step, for that '
            f'run goes on; name the step, as in --fork={fork.workdir}@{fork.step.name}'
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
    workdir: epath.Path,
    config: ConfigDict,
    base_checkpoint: str,
    fingerprint: str,
    *,
    step: int = 0,
    changes: Sequence[Change] = (),
    fork: Fork | None = None,
) -> dict[str, Any]:
    """Writes config.json and returns what it holds; says what of the run is no longer exact from `step` on."""
    recorded = read_record(workdir) or {}
    history = [*recorded.get('history', []), *({'step': step, **change} for change in changes)]
    origin = (
        {'from': fork.given, 'workdir': str(fork.workdir), 'step': step} if fork else recorded.get('fork')
    )
    record = {
        'config': json.loads(config.to_json()),
        'base_checkpoint': base_checkpoint,
        'data_fingerprint': fingerprint,
        'unit_bytes': unit_bytes_of(workdir, fork),
        **({'fork': origin} if origin else {}),
        **({'history': history} if history else {}),
    }
    for change in changes:
        key, before, after = change['key'], change['before'], change['after']
        logger.info('from step %d on %s is %r, not %r: %s', step, key, after, before, _OVERRIDABLE[key])
    if runtime.is_main_process():
        storage.write_atomically(workdir / CONFIG_FILE, json.dumps(record, indent=2) + '\n')
    return record


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether there is something to resume from; process 0 looks, for all."""
    checkpoints = workdir / CHECKPOINTS
    found = runtime.is_main_process() and checkpoints.exists()
    found = found and any(path.name.isdigit() for path in checkpoints.iterdir())
    return bool(runtime.from_main_process(np.array(found)))
