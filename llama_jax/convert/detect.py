"""Which format a checkpoint is in, told from what it holds, never from its name alone."""

import re
from collections.abc import Collection
from typing import Literal

from etils import epath

from llama_jax.convert.llama2c import HEADER_BYTES, MAGIC
from llama_jax.errors import InputError
from llama_jax.storage import read_range

Format = Literal['orbax', 'meta', 'huggingface', 'gguf', 'llama2c', 'peft']
# What stands beside a file that is part of a folder, the folder's format, and the file's name.
_PARTS: tuple[tuple[str, Format, str], ...] = (
    ('model.json', 'orbax', r'model\.json|tokenizer\.\w+'),
    ('params.json', 'meta', r'params\.json|consolidated\..*\.pth|tokenizer\.model'),
    ('adapter_config.json', 'peft', r'adapter_.*'),
    ('config.json', 'huggingface', r'.*\.safetensors|pytorch_model.*\.bin|.*\.json|tokenizer\.model'),
)


def detect(path: epath.Path) -> tuple[Format, epath.Path]:
    """The format of what is at `path`, and the folder or file to open: that path, or the one checkpoint within it.

    Raises:
      InputError: nothing is there, or nothing that is a Llama.
    """
    if not path.exists():
        raise InputError(f'no checkpoint at {path}: there is no such file or folder')
    if not path.is_dir():
        return _detect_file(path)
    names = {file.name for file in path.iterdir()}
    if 'model.json' in names:
        return 'orbax', path
    if 'params.json' in names or any(name.startswith('consolidated.') for name in names):
        return 'meta', path
    # Some save the base's config.json beside an adapter.
    if 'adapter_config.json' in names and not any(re.match(r'(pytorch_)?model\b', name) for name in names):
        return 'peft', path
    if 'config.json' in names:
        return 'huggingface', path
    if adapters := sorted(name for name in names if name.startswith('adapter_')):
        raise InputError(_adapter(path, adapters[0]))
    models = sorted(filter(_is_model_file, names))
    if len(models) == 1:
        return _detect_file(path / models[0])
    if 'snapshots' in names and (snapshot := _snapshot(path)) is not None:
        return detect(snapshot)
    if inside := _checkpoints_in(path, names):
        raise InputError(
            f'{path} is not a checkpoint itself, but holds {len(inside)}; give one by its path: '
            + ', '.join(map(str, inside[:8]))
        )
    found = ', '.join(sorted(names)[:5]) or 'nothing'
    raise InputError(
        f'{path} is not a checkpoint: it holds {found}; a folder of ours has model.json, of Meta params.json, '
        'of Hugging Face config.json, and a .gguf or a .pt or .bin of llama2.c is given by its own path'
    )


def _snapshot(path: epath.Path) -> epath.Path | None:
    """Of a model's folder in the hub's cache, `models--ORGANISATION--NAME`: what `main` is, or the one there is."""
    snapshots = sorted(folder for folder in (path / 'snapshots').iterdir() if folder.is_dir())
    main = path / 'refs' / 'main'
    name = main.read_text().strip() if main.is_file() else ''
    chosen = [folder for folder in snapshots if folder.name == name] or (
        snapshots if len(snapshots) == 1 else []
    )
    return chosen[0] if chosen else None


def _checkpoints_in(path: epath.Path, names: Collection[str]) -> list[epath.Path]:
    """Folders and files just below that are checkpoints by their look."""
    marks = ('model.json', 'params.json', 'config.json', 'adapter_config.json', 'snapshots')
    found = []
    for name in sorted(names)[:1000]:
        place = path / name
        if _is_model_file(name) or (place.is_dir() and any((place / mark).exists() for mark in marks)):
            found.append(place)
    return found


def _is_model_file(name: str) -> bool:
    return name.endswith(('.gguf', '.pt', '.bin')) and name != 'tokenizer.bin'


def _adapter(path: epath.Path, name: str) -> str:
    return (
        f'{path} is a part of a LoRA adapter ({name}), without the adapter_config.json that says how it is meant; copy '
        'that beside it, and give the folder'
    )


def _detect_file(path: epath.Path) -> tuple[Format, epath.Path]:
    for mark, form, pattern in _PARTS:
        if re.fullmatch(pattern, path.name) and (path.parent / mark).exists():
            return form, path.parent  # a part of the folder, which is meant
    if path.name.startswith('adapter_'):
        raise InputError(_adapter(path, path.name))
    head = read_range(path, 0, HEADER_BYTES[0])
    if head[:4] == b'GGUF':
        return 'gguf', path
    if re.fullmatch(r'(pytorch_model|model|consolidated)\b.*\.(bin|pth|safetensors)', path.name):
        raise InputError(
            f'{path} holds weights alone; put the config.json (of Hugging Face) or params.json (of Meta) that belongs '
            'to them beside it, and give the folder'
        )
    may_be_version_0 = len(head) == HEADER_BYTES[0] and path.name.endswith('.bin')
    if head[:4] in (b'PK\3\4', MAGIC) or may_be_version_0:
        return 'llama2c', path
    raise InputError(
        f'{path} is not a checkpoint: it begins with {head[:4]!r}; a file is a .gguf, or a .pt or .bin of llama2.c'
    )
