"""Where a run's figures go: metrics.jsonl always, TensorBoard and W&B when asked for.

metrics.jsonl has one object per logged step and no step twice: resuming cuts it back to the restored step. An object
store cannot append or rename, so there the file is written whole, before each checkpoint and at the end.
"""

import contextlib
import functools
import io
import json
import logging
import math
import os
import queue
import socket
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from llama_jax.errors import InputError, error_line
from llama_jax.storage import AppendedFile, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


@runtime_checkable
class Writer(Protocol):
    """A sink for figures."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Takes figures of a step; steps come in order, and those of one step may come one after the other."""

    def flush(self) -> dict[str, Any]:
        """Returns, when all figures are where a kill cannot take them, what a checkpoint should keep of them."""
        ...

    def close(self) -> None:
        """Flushes and lets go."""


class JsonlWriter:
    """metrics.jsonl, cut back to the restored step first; what it has lost since then is said in a warning."""

    def __init__(self, path: epath.PathLike, restored_step: int = 0, restored: dict[str, Any] | None = None):
        """Opens or begins the file.

        Args:
          path: of the file.
          restored_step: lines of later steps are dropped.
          restored: what `flush` returned when that step was saved, where it is known.
        """
        self._path = epath.Path(path)
        lines, damaged = _read_lines(self._path)
        self._lines = [line for line, values in lines if values['step'] <= restored_step]
        self._checksum = _checksum(self._lines)
        self._warn_of_losses(restored_step, (restored or {}).get('metrics'), damaged)
        self._written = 0
        self._rewrite()
        self._file = None if '://' in os.fspath(path) else AppendedFile(self._path)

    def _warn_of_losses(self, step: int, logged: dict[str, int] | None, damaged: list[int]) -> None:
        if damaged:
            logger.warning(
                '%s: %s damaged and dropped (%s)', self._path, _count(len(damaged), 'line is', 'lines are'),
                f'line {damaged[0]}' if len(damaged) == 1 else f'the first is line {damaged[0]}',
            )  # fmt: skip
        if not logged or logged['checksum'] == _checksum(self._lines, logged.get('last')):
            return
        total, lost = logged['lines'], logged['lines'] - len(self._lines)
        if lost:
            text = f'of the {total} steps that were logged up to step {step}, {lost} are lost'
        else:
            text = f'the figures up to step {step} are not those that were logged; the file was changed or is damaged'
        logger.warning('%s: %s', self._path, text)

    def _rewrite(self) -> None:
        write_atomically(self._path, b''.join(line + b'\n' for line in self._lines))
        self._written = len(self._lines)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._lines and (before := json.loads(self._lines[-1]))['step'] == step:
            self._extend(before | values)
            return
        line = json.dumps({'step': step, **values}).encode()
        self._lines.append(line)
        self._checksum = _add_to_checksum(self._checksum, line)
        if self._file is not None:
            self._file.append(line + b'\n')

    def _extend(self, values: dict[str, Any]) -> None:
        """What was measured of the last step joins its line, which grows at its end."""
        self._lines[-1] = json.dumps(values).encode()
        self._checksum = _checksum(self._lines)
        self._written = len(self._lines) - 1
        if self._file is not None:
            self._file.close()
            self._rewrite()
            self._file = AppendedFile(self._path)

    def flush(self) -> dict[str, Any]:
        if self._file is not None:
            self._file.sync()
        elif self._written < len(self._lines):
            self._rewrite()
        last = len(self._lines[-1]) if self._lines else 0
        return {'metrics': {'lines': len(self._lines), 'checksum': self._checksum, 'last': last}}

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _checksum(lines: list[bytes], last: int | None = None) -> int:
    """Of the lines, the last of which had so many bytes: what was measured of its step came later."""
    if last and lines and len(lines[-1]) > last:
        lines = [*lines[:-1], lines[-1][: last - 1] + b'}']
    return functools.reduce(_add_to_checksum, lines, 0)


def _add_to_checksum(checksum: int, line: bytes) -> int:
    return zlib.crc32(line + b'\n', checksum)


def _count(number: int, one: str, more: str) -> str:
    return f'{number:,} {one if number == 1 else more}'


def _read_lines(path: epath.Path) -> tuple[list[tuple[bytes, dict[str, Any]]], list[int]]:
    """(the lines of a metrics file with their objects, numbers from 1 of lines that hold none).

    A last line that a kill cut off is none. Steps rise from line to line; one that does not is damaged.
    """
    lines, damaged, step = [], [], 0
    for number, line in enumerate(path.read_bytes().split(b'\n')[:-1] if path.exists() else (), start=1):
        values = _parse(line)
        if values and values['step'] > step:
            lines.append((line, values))
            step = values['step']
        else:
            damaged.append(number)
    return lines, damaged


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None where it is damaged."""
    try:
        values = json.loads(line)
        return values if isinstance(values['step'], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl."""
    return [values for _, values in _read_lines(epath.Path(path))[0]]


def metrics(workdir: epath.PathLike) -> dict[str, np.ndarray]:
    """What a run has logged, a column for each figure, NaN where a step has none: `pandas.DataFrame` takes it as it is.

        figures = llama_jax.metrics('runs/tiny')
        figures['step'], figures['loss']

    Args:
      workdir: of a run, or its metrics.jsonl.

    Raises:
      InputError: there are no figures.
    """
    place = epath.Path(workdir)
    file = place / 'metrics.jsonl' if place.is_dir() else place
    lines = read_metrics(file)
    if not lines:
        raise InputError(f'no figures of a run at {file}; give the workdir of one that has logged a step')
    names = dict.fromkeys(
        name for line in lines for name, value in line.items() if isinstance(value, int | float)
    )
    found = {name: np.array([line.get(name, math.nan) for line in lines], float) for name in names}
    return found | {'step': found['step'].astype(int)}


class TensorBoardWriter:
    """An events file under a folder; in a bucket it is written whole at each flush."""

    def __init__(self, directory: epath.PathLike, restored_step: int = 0):
        """Begins a file; TensorBoard then drops what files of before hold of steps later than `restored_step`."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        name = f'events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}'
        self._path = epath.Path(directory) / name
        self._data = bytearray()
        self._file: AppendedFile | None = None
        if '://' not in os.fspath(directory):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = AppendedFile(self._path)
        self._add(Event(wall_time=time.time(), file_version='brain.Event:2'))
        restart = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=restored_step + 1, session_log=restart))

    def _add(self, event: Any) -> None:
        """As TensorFlow's records are: the length with its checksum, the data with theirs."""
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        head = struct.pack('<Q', len(data))
        record = b''.join(
            (head, struct.pack('<I', masked_crc32c(head)), data, struct.pack('<I', masked_crc32c(data)))
        )
        if self._file is not None:
            self._file.append(record)
        else:
            self._data += record

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def flush(self) -> dict[str, Any]:
        if self._file is not None:
            self._file.sync()
        else:
            self._path.write_bytes(bytes(self._data))
        return {}

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


class WandbWriter:
    """A Weights & Biases run, which goes on when the workdir does: its id is kept there."""

    def __init__(self, project: str, workdir: epath.PathLike, config: dict[str, Any]):
        """Begins or resumes the run.

        Args:
          project: of W&B.
          workdir: of the run, local or in a bucket; its name is shown, and wandb.json within holds the id.
          config: shown with the run.

        Raises:
          InputError: the package is missing, or W&B cannot begin (no key, no network).
        """
        try:
            import wandb
        except ImportError as error:
            raise InputError("W&B needs the package wandb: pip install 'llama_jax[wandb]'") from error
        self._teardown = wandb.teardown
        workdir = epath.Path(workdir)
        file = workdir / 'wandb.json'
        if not file.exists():  # no two runs share an id, whatever their folders are called
            write_atomically(file, json.dumps({'id': uuid.uuid4().hex}) + '\n')
        try:
            self._run = wandb.init(
                project=project, id=json.loads(file.read_text())['id'], name=workdir.name, resume='allow',
                config=config, dir=None if '://' in os.fspath(workdir) else os.fspath(workdir),
            )  # fmt: skip
        except (wandb.Error, ValueError, TypeError, KeyError) as error:
            raise InputError(f'W&B cannot begin: {error_line(error)}') from error

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> dict[str, Any]:
        self._run.status()  # an answer of the service: figures alone go to one that hangs, too
        return {}

    def close(self) -> None:
        self._run.finish()

    def abandon(self) -> None:
        """Lets go of a service that has died or hangs: W&B would wait for it, or fail, when Python ends."""
        self._teardown()


class Aside:
    """A writer that a run can do without, on a thread of its own: where it fails or hangs, a warning ends it alone."""

    def __init__(self, name: str, begin: Callable[[], Writer], patience: float = 10.0):
        """Begins on the thread.

        Args:
          name: of where the figures go.
          begin: makes the writer.
          patience: seconds that one call may take; `close` may take three times as long, for what is still to be sent.
        """
        self._name, self._patience = name, patience
        self._calls: queue.SimpleQueue[Callable[[Writer], Any] | None] = queue.SimpleQueue()
        self._since: float | None = None  # when the call that is being made began
        self._off = False
        self._writer: Writer | None = None
        self._thread = threading.Thread(target=self._work, args=(begin,), daemon=True, name=name)
        self._thread.start()

    def _work(self, begin: Callable[[], Writer]) -> None:
        try:
            self._since = time.monotonic()
            self._writer = writer = begin()
            self._since = None
            while not self._off and (call := self._calls.get()):
                self._since = time.monotonic()
                call(writer)
                self._since = None
        except Exception as error:
            self._give_up(error_line(error))

    def _give_up(self, reason: str) -> None:
        if not self._off:
            self._off = True
            logger.warning('%s takes no more figures (%s); the run goes on without it', self._name, reason)
            if abandon := getattr(self._writer, 'abandon', None):
                threading.Thread(target=_ignoring_errors, args=(abandon,), daemon=True).start()

    def _call(self, call: Callable[[Writer], Any]) -> None:
        since = self._since
        if since is not None and time.monotonic() - since > self._patience:
            self._give_up(f'it has not answered for {self._patience:g} s')
        if not self._off:
            self._calls.put(call)

    def _wait(self, call: Callable[[Writer], Any], seconds: float) -> None:
        done = threading.Event()
        self._call(lambda writer: (call(writer), done.set()))
        end = time.monotonic() + seconds
        while not self._off and not done.wait(0.05):
            if time.monotonic() > end:
                self._give_up(f'it has not answered for {seconds:g} s')

    def write(self, step: int, values: dict[str, float]) -> None:
        self._call(lambda writer: writer.write(step, values))

    def flush(self) -> dict[str, Any]:
        self._wait(lambda writer: writer.flush(), self._patience)
        return {}

    def close(self) -> None:
        self._wait(lambda writer: writer.close(), 3 * self._patience)
        self._calls.put(None)


def _ignoring_errors(call: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        call()


def plot_loss(path: epath.PathLike, *arguments: Any) -> None:
    """Writes `loss_figure` of these arguments as a PNG."""
    image = io.BytesIO()
    loss_figure(*arguments).savefig(image, format='png', dpi=120)
    write_atomically(epath.Path(path), image.getvalue())


def loss_figure(
    metrics: list[dict[str, Any]], baselines: dict[str, float], unit: str = 'nats per token'
) -> 'Figure':
    """Training and validation loss over steps, with horizontal lines to beat.

    Args:
      metrics: as `read_metrics` gives them.
      baselines: losses by name.
      unit: of the loss.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')  # of no pyplot: whose figures are the caller's
    axes = figure.subplots()
    # Where the loss is likelihood and more, the likelihood is what compares with validation and baselines.
    trained = 'nll' if unit == 'nats per token' and any('nll' in item for item in metrics) else 'loss'
    styles: dict[str, dict[str, Any]] = {trained: {'linewidth': 1.0}, 'validation_loss': {'marker': 'o'}}
    for key, style in styles.items():
        logged = [item for item in metrics if key in item]
        if logged:
            steps, losses = [item['step'] for item in logged], [item[key] for item in logged]
            dot: dict[str, Any] = {'marker': '.'} if len(logged) == 1 else {}  # a line of one point is none
            axes.plot(steps, losses, label=key.replace('_', ' '), **(dot | style))
    for index, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, linestyle='--', color=f'C{index + 2}', label=f'{name} {value:.3f}')
    axes.set(xlabel='step', ylabel=unit, title='Loss')
    axes.locator_params(axis='x', integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
