"""Where a run's figures go: metrics.jsonl always, TensorBoard and W&B when asked for.

metrics.jsonl has one object per logged step and no step twice: resuming cuts it back to the restored step. An object
store cannot append or rename, so there the file is written whole, before each checkpoint and at the end.
"""

import io
import json
import math
import tempfile
from typing import Any, Protocol, runtime_checkable

from etils import epath

from llama_jax.storage import write_atomically
from llama_jax.types import InputError


@runtime_checkable
class Writer(Protocol):
    """A sink for figures."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Takes the figures of a step; steps come in order."""

    def flush(self) -> None:
        """Returns when all figures are where a killed process cannot lose them."""

    def close(self) -> None:
        """Flushes and lets go."""


class JsonlWriter:
    """metrics.jsonl, cut back to the restored step first."""

    def __init__(self, path: epath.PathLike, restored_step: int = 0):
        self._path = epath.Path(path)
        self._lines = [line for line in _read_lines(self._path) if json.loads(line)['step'] <= restored_step]
        self._appends = '://' not in str(path)
        self._written = 0
        self._rewrite()
        self._file = open(self._path, 'a', encoding='utf-8') if self._appends else None  # noqa: SIM115

    def _rewrite(self) -> None:
        write_atomically(self._path, ''.join(f'{line}\n' for line in self._lines))
        self._written = len(self._lines)

    def write(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({'step': step, **values})
        self._lines.append(line)
        if self._file is not None:
            self._file.write(f'{line}\n')
            self._file.flush()

    def flush(self) -> None:
        if self._file is None and self._written < len(self._lines):
            self._rewrite()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _read_lines(path: epath.Path) -> list[str]:
    """The whole lines of a metrics file; a last one that a kill cut off is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().split('\n')
    return [line for line in lines[:-1] if line]


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl."""
    return [json.loads(line) for line in _read_lines(epath.Path(path))]


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

    def flush(self) -> None:
        self._writer.flush()
        if self._local != str(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            for file in epath.Path(self._local).iterdir():
                (self._directory / file.name).write_bytes(file.read_bytes())

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

    def flush(self) -> None:
        pass

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
