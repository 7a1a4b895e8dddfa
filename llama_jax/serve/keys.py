"""The file that holds the keys of clients."""

import re

from etils import epath

from llama_jax.errors import InputError
from llama_jax.json_file import read_bytes

_MAX_BYTES = 1 << 20
_KEY = re.compile(r'[!-~]{8,512}')


def read_keys(path: str) -> tuple[str, ...]:
    """Keys, one a line; empty lines and those that begin with # do not count.

    Raises:
      InputError: there are none, or one is none; the line is named, and the key is not shown.
    """
    keys = []
    for number, line in enumerate(
        read_bytes(epath.Path(path), _MAX_BYTES).decode(errors='replace').splitlines(), 1
    ):
        key = line.strip()
        if not key or key.startswith('#'):
            continue
        if not _KEY.fullmatch(key):
            raise InputError(
                f'{path} line {number} is no key; a key has 8 to 512 letters, digits and signs, and no spaces'
            )
        keys.append(key)
    if not keys:
        raise InputError(f'{path} holds no keys; write one a line')
    return tuple(keys)
