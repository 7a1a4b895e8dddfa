"""The JSON of a checkpoint: parsed strictly, and shown in messages."""

import json

from llama_jax.types import InputError


def parse_json(data: bytes, origin: str) -> dict:
    """The JSON object in these bytes; `origin` names it in messages.

    Raises:
      InputError: it is no JSON, no object, or has a key twice or a number that JSON does not know.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f'{origin} is not JSON: {show_json(error)}; copy or download the file again'
        ) from None
    if not isinstance(value, dict):
        raise InputError(f'{origin} is a JSON {type(value).__name__}, it must be an object')
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f'the key {show_json(name)} stands twice')
        values[name] = value
    return values


def _refuse_constant(constant: str) -> object:
    raise ValueError(f'{constant} is no number')


def show_json(value: object) -> str:
    """A value of such a file, or what was wrong with it, as a message can hold it: one line, not long."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = ' '.join(text.split())
    return text if len(text) <= 120 else f'{text[:120]}...'
