"""`model.json` of a workdir: the architecture that its checkpoints are meaningless without."""

import json
from typing import Any

from etils import epath

from llama_jax.errors import InputError
from llama_jax.json_file import read_object
from llama_jax.models.config import LlamaConfig
from llama_jax.storage import write_atomically

MODEL_FILE = 'model.json'
CHECKPOINTS = 'checkpoints'  # the folder of steps beside it


def read_config(folder: epath.Path) -> LlamaConfig:
    """The architecture of a workdir.

    Raises:
      InputError: the file is missing or damaged.
    """
    file = folder / MODEL_FILE
    try:
        return LlamaConfig.from_dict(read_object(file).get('config'))
    except InputError as error:
        raise InputError(f'{file} does not describe a model: {error}') from None


def read_quantization(folder: epath.Path) -> Any:
    """What a workdir's weights are stored as, where that is not floating point; None where it is."""
    return read_object(folder / MODEL_FILE).get('quantization')


def read_adapters(folder: epath.Path) -> dict[str, Any]:
    """What a workdir's weights are beside, where they are adapters; {} where they are a whole model.

    Returns:
      `base` its path, its `fingerprint`, `weights` how it was kept; `scale` and what else was trained.

    Raises:
      InputError: it is no description of adapters.
    """
    found = read_object(folder / MODEL_FILE).get('adapters') or {}
    kinds = {'base': str, 'fingerprint': str, 'weights': str, 'scale': float, 'targets': list, 'layers': list}
    for key, kind in kinds.items() if found else ():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise InputError(
                f'{folder / MODEL_FILE} does not describe adapters: {key} is '
                f'{str(found.get(key) if isinstance(found, dict) else found)[:60]!r}, not {kind.__name__}'
            )
    return found


def save_config(folder: epath.Path, config: LlamaConfig, **provenance: Any) -> None:
    """Writes `model.json`: the architecture, and where the weights started from."""
    _write(folder, {'config': config.to_dict(), **provenance})


def add_to_config(folder: epath.Path, **provenance: Any) -> None:
    """Writes more into a `model.json` that is there; all else that it says stays."""
    _write(folder, json.loads((folder / MODEL_FILE).read_text()) | provenance)


def _write(folder: epath.Path, content: dict[str, Any]) -> None:
    write_atomically(folder / MODEL_FILE, json.dumps(content, indent=2) + '\n')
