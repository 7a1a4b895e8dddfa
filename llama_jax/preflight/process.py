"""Preflight in a process of its own, so that who asks keeps the devices it has."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from llama_jax.errors import InputError, checked_names
from llama_jax.json_file import check_replaceable, parse_object, read_bytes
from llama_jax.storage import check_place, write_atomically

_KEPT = 'asked', 'report'
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling a step for a topology has told; see docs/preflight.md for the fields.

    Attributes:
      text: as the command prints it.
      search: what was tried where the step does not fit; {} where it does.
    """

    model: str
    topology: str
    chips: int
    devices: int
    chip: Mapping[str, Any]
    mesh: Mapping[str, int]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    process_memory: float
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decode: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ''

    def __repr__(self) -> str:
        return self.text


@checked_names()
def run(
    config: str,
    topology: str,
    settings: Mapping[str, Any] | None = None,
    *,
    decode_batch: int = 0,
    keep: epath.PathLike = '',
) -> Report:
    """Compiles a configuration's step for TPUs that are not there, and says what it needs.

        report = llama_jax.preflight.run('configs/pretrain.py:llama2_7b', 'v5p:2x2x4')

    Args:
      config: a configuration file with its argument, as the commands take it.
      topology: as 'v5e:4x4', '2xv5p:4x4x8' or 'v5p-256'.
      settings: keys of the configuration that are set otherwise, as {'train.batch_size': 256}.
      decode_batch: rows of a step of generation to compile too; 0: none.
      keep: a file where the report stays, as compiling takes minutes: asked the same again, it is read; one of another
        question is replaced, any other file refused.

    Raises:
      InputError: as the command refuses it.
    """
    given = {'config': config, 'topology': topology, 'decode_batch': decode_batch}
    given |= {f'config.{key}': value for key, value in (settings or {}).items()}
    asked = {name: str(value) for name, value in given.items()}
    asked |= {name: importlib.metadata.version(name) for name in ('llama_jax', 'jax')}
    file = epath.Path(keep) if keep else None
    if file and (report := _kept(file, asked)):
        return report
    report = _compiled(given)
    if file:
        kept = {'asked': asked, 'report': dataclasses.asdict(report)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(kept, indent=1) + '\n')
    return report


def _kept(file: epath.Path, asked: Mapping[str, str]) -> Report | None:
    """What was told of this question; None where the file is not there, or of another one, which is said.

    Raises:
      InputError: it cannot be written, or is no kept report: it would be lost.
    """
    check_place(file, folder=False)
    check_replaceable(file, _KEPT)
    found = read_bytes(file) if file.exists() else b''
    if not found:
        return None
    kept = parse_object(found, str(file))
    if kept['asked'] == asked:
        with contextlib.suppress(TypeError):  # it is damaged
            return Report(**kept['report'])
    _log.info('%s is of another question or version, or damaged; it is replaced', file)
    return None


def _compiled(given: Mapping[str, Any]) -> Report:
    """What the command tells, given these flags."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, 'report.json')
        flags = [f'--{name}={value}' for name, value in {**given, 'json': file}.items()]
        command = [sys.executable, '-m', 'experiments.preflight', *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f'status {done.returncode}']
            raise InputError(lines[-1].removeprefix('error: '))
        with open(file) as report:
            values = json.load(report)
    known = {field.name for field in dataclasses.fields(Report)}
    return Report(
        text=done.stdout.strip(), **{name: value for name, value in values.items() if name in known}
    )
