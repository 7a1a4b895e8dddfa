"""A configuration file: its keys by dotted name, the paths among its values, what is wrong with it in one line."""

import functools
import re
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

import configs
from llama_jax import storage
from llama_jax.errors import InputError, did_you_mean, error_line

# What of a configuration names files: '~' stands for the user's folder in them as in the flags of `define_path`.
PATH_KEYS = (
    'data.train', 'data.validation', 'data.tokenizer', 'eval.tasks', 'eval.data_dir', 'log.compilation_cache',
    'algorithm.rewards', 'algorithm.values_from',
)  # fmt: skip
_RECIPE_PATHS = re.compile(r'tokenizer|sources\..+\.input')  # those of `configs/prepare_data.py`


def is_path(key: str) -> bool:
    """Whether a key of a configuration names files."""
    return key in PATH_KEYS or bool(_RECIPE_PATHS.fullmatch(key))


def flatten(values: Any, prefix: str = '') -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in values.items():
        if hasattr(value, 'items'):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[f'{prefix}{key}'] = value
    return flat


def split_list(text: str) -> tuple[str, ...]:
    """'a, b' -> ('a', 'b')."""
    return tuple(filter(None, (part.strip() for part in text.split(','))))


def expand_paths(text: str) -> str:
    """'~' at the beginning of each path of a list, also behind the mark of a source or a task."""
    return ','.join(storage.expand_user(part) for part in text.split(','))


def expand_user(config: ConfigDict) -> None:
    """'~' in all paths of a configuration, in place."""
    for key, value in flatten(config).items():
        if is_path(key) and isinstance(value, str):
            *above, name = key.split('.')
            section = functools.reduce(lambda inner, part: inner[part], above, config)
            section[name] = expand_paths(value)


def find(path: str) -> str:
    """The path of a configuration, FILE or FILE:ARGUMENT; what is not under this folder is looked for among our own."""
    path = storage.expand_user(path)
    file, colon, argument = path.partition(':')
    ours = epath.Path(configs.__file__).parent.parent / file
    return f'{ours}{colon}{argument}' if not epath.Path(file).exists() and ours.is_file() else path


def example() -> str:
    """A configuration that the command at hand takes."""
    command = epath.Path(sys.argv[0]).stem
    has_own = (epath.Path(configs.__file__).parent / f'{command}.py').exists()
    argument = 'llama' if command == 'prepare_data' else 'llama2_7b'
    return f'configs/{command if has_own else "pretrain"}.py:{argument}'


def describe_error(error: Exception, argv: Sequence[str]) -> str:
    """ml_collections names a bad key deep in a traceback: find the argument, and the keys it might have meant."""
    path = next((arg.removeprefix('--config=') for arg in argv if arg.startswith('--config=')), '')
    file = path.partition(':')[0]
    if not epath.Path(file).exists():
        return f'--config={path}: there is no file {file}; name one such as {example()}'
    try:
        known = flatten(_load(path))
    except InputError as cause:
        return f'--config={path}: {cause}'
    except Exception as cause:
        return f'--config={path} cannot be loaded: {type(cause).__name__}: {error_line(cause)}'
    settings = {
        arg: arg.removeprefix('--config.').split('=', 1) for arg in argv if arg.startswith('--config.')
    }
    for key, *_ in settings.values():
        if key not in known:
            return f'unknown config key --config.{key}; {did_you_mean(key, known)}'
    text = str(error)
    for arg in sorted(
        settings, key=lambda arg: f'flag {arg}:' not in text
    ):  # the one that is named comes first
        key, *value = settings[arg]
        kind = type(known[key]).__name__
        if f'flag {arg}:' in text or kind in text or repr(''.join(value)) in text:
            return f'{arg}: the value must be of type {kind}, as {known[key]!r} is'
    return f'configuration: {error_line(error)}'


def _load(path: str) -> ConfigDict:
    file, _, argument = path.partition(':')
    get_config = runpy.run_path(file)['get_config']
    return get_config(argument) if argument else get_config()
