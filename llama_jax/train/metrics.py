"""Where a run's figures go: metrics.jsonl always, TensorBoard and W&B when asked for.

metrics.jsonl has one object per logged step and no step twice: resuming cuts it back to the restored step. An object
store cannot append or rename, so there the file is written whole, before each checkpoint and at the end.
"""

import functools
import io
import json
import logging
import math
import os
import tempfile
import zlib
from typing import Any, Protocol, runtime_checkable

from etils import epath

from llama_jax.storage import AppendedFile, write_atomically
from llama_jax.types import InputError

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


class TensorBoardWriter:
    """Event files under a folder; for an object store they are written locally and copied at each flush."""

    def __init__(self, directory: epath.PathLike):
        from tensorboardX import SummaryWriter

        self._directory = epath.Path(directory)
        self._local = tempfile.mkdtemp() if '://' in str(directory) else str(directory)
        self._writer = SummaryWriter(self._local)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def flush(self) -> dict[str, Any]:
        self._writer.flush()
        if self._local != str(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            for file in epath.Path(self._local).iterdir():
                (self._directory / file.name).write_bytes(file.read_bytes())
        return {}

    def close(self) -> None:
        self.flush()
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run; resumed with the same id when the workdir is."""

    def __init__(self, project: str, run_id: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                "--config.log.wandb needs the package wandb: pip install 'llama_jax[wandb]'"
            ) from error
        self._run = wandb.init(project=project, id=run_id, resume='allow', config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._run.finish()


def plot_loss(path: epath.PathLike, metrics: list[dict[str, Any]], baselines: dict[str, float]) -> None:
    """Draws training and validation loss over steps, with horizontal lines to beat, as a PNG."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout='constrained')
    styles: dict[str, dict[str, Any]] = {'loss': {'linewidth': 1.0}, 'validation_loss': {'marker': 'o'}}
    for key, style in styles.items():
        logged = [item for item in metrics if key in item]
        if logged:
            steps, losses = [item['step'] for item in logged], [item[key] for item in logged]
            axes.plot(steps, losses, label=key.replace('_', ' '), **style)
    for index, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, linestyle='--', color=f'C{index + 2}', label=f'{name} {value:.3f}')
    axes.set(xlabel='step', ylabel='nats per token', title='Loss')
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=120)
    pyplot.close(figure)
    write_atomically(epath.Path(path), image.getvalue())
