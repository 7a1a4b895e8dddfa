"""Which format a checkpoint is in, told from what it holds, never from its name alone."""

from typing import Literal

from etils import epath

from llama_jax.convert.llama2c import HEADER_BYTES, MAGIC
from llama_jax.storage import read_range
from llama_jax.types import InputError

Format = Literal['orbax', 'meta', 'huggingface', 'gguf', 'llama2c']


def detect(path: epath.Path) -> tuple[Format, epath.Path]:
    """The format of what is at `path`, and the folder or file to open: that path, or the one checkpoint within it.

    Raises:
      InputError: nothing is there, or nothing that is a Llama.
    """
    if not path.exists():
        raise InputError(f'no checkpoint at {path}: there is no such file or folder')
    if not path.is_dir():
        return _detect_file(path), path
    names = {file.name for file in path.iterdir()}
    if 'model.json' in names:
        return 'orbax', path
    if 'params.json' in names or any(name.startswith('consolidated.') for name in names):
        return 'meta', path
    if 'config.json' in names:
        return 'huggingface', path
    models = sorted(name for name in names if name.endswith(('.gguf', '.pt', '.bin')))
    if len(models) == 1:
        return _detect_file(path / models[0]), path / models[0]
    found = ', '.join(sorted(names)[:5]) or 'nothing'
    raise InputError(
        f'{path} is not a checkpoint: it holds {found}; a folder of ours has model.json, of Meta params.json, '
        'of Hugging Face config.json, and a .gguf or a .pt or .bin of llama2.c is given by its own path'
    )


def _detect_file(path: epath.Path) -> Format:
    head = read_range(path, 0, HEADER_BYTES[0])
    if head[:4] == b'GGUF':
        return 'gguf'
    may_be_version_0 = len(head) == HEADER_BYTES[0] and path.name.endswith('.bin')
    if head[:4] in (b'PK\3\4', MAGIC) or may_be_version_0:
        return 'llama2c'
    raise InputError(
        f'{path} is not a checkpoint: it begins with {head[:4]!r}; a file is a .gguf, or a .pt or .bin of llama2.c'
    )
