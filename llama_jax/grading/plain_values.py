"""Plain values of Python as JSON text and back: all that crosses between a program and its tests.

What arrives is made here, of built-in types alone, so that `==` on it is Python's own, whatever the sender is. What is
no plain value crosses as a reference: a name or a number by which its owner finds it again.
"""

import decimal
import fractions
import json
import sys
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any

_CONTAINERS: dict[str, type] = {'tuple': tuple, 'set': set, 'frozenset': frozenset, 'deque': deque}
_EXACT_INT = 1 << 63  # beyond it in hexadecimal, which has no limit of digits


def encode(value: Any, refer: Callable[[Any], str | int]) -> bytes:
    """JSON text of a value; subclasses (Counter, an IntEnum, a named tuple) become what they are made of.

    Args:
      value: to send.
      refer: gives what is no plain value a name or number, or raises.

    Raises:
      RecursionError: nested too deep, or within itself.
    """
    return json.dumps(_pack(value, refer)).encode()


def decode(text: bytes, resolve: Callable[[str | int], Any]) -> Any:
    """The value of a JSON text.

    Args:
      text: from `encode`, or from an enemy.
      resolve: what a name or number stands for.

    Raises:
      ValueError, TypeError, RecursionError: it is no such text.
    """
    return _unpack(json.loads(text), resolve)


def _pack(value: Any, refer: Callable[[Any], str | int]) -> Any:
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        value = int.__int__(value)
        return value if -_EXACT_INT < value < _EXACT_INT else {'int': hex(value)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return {'complex': [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()}
    if isinstance(value, fractions.Fraction):
        return {'fraction': [hex(value.numerator), hex(value.denominator)]}
    if isinstance(value, decimal.Decimal):
        return {'decimal': str(value)}
    if isinstance(value, range):
        return {'range': [_pack(part, refer) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {'dict': [[_pack(key, refer), _pack(item, refer)] for key, item in dict.items(value)]}
    if isinstance(value, list):
        return [_pack(item, refer) for item in list.__iter__(value)]
    for kind, container in _CONTAINERS.items():
        if isinstance(value, container):
            return {kind: [_pack(item, refer) for item in value]}
    for kind, view in (
        ('keys', KeysView),
        ('values', ValuesView),
        ('items', ItemsView),
        ('iterator', Iterator),
    ):
        if isinstance(value, view):
            return {kind: [_pack(item, refer) for item in value]}
    numpy = sys.modules.get('numpy')
    if numpy and isinstance(value, numpy.generic):
        return _pack(value.item(), refer)
    return {'reference': refer(value)}


def _unpack(data: Any, resolve: Callable[[str | int], Any]) -> Any:
    if isinstance(data, list):
        return [_unpack(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == 'reference' and type(content) in (str, int):
        return resolve(content)
    if kind == 'int':
        return int(content, 16)
    if kind == 'fraction':
        return fractions.Fraction(*(int(part, 16) for part in content))
    if kind == 'decimal':
        return decimal.Decimal(content)
    if kind in ('bytes', 'bytearray'):
        return {'bytes': bytes, 'bytearray': bytearray}[kind].fromhex(content)
    if not isinstance(content, list):
        raise ValueError(f'{kind} is no kind of value')
    items = [_unpack(item, resolve) for item in content]
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](items)
    if kind == 'dict':
        return {key: item for key, item in items}
    if kind == 'complex':
        return complex(*items)
    if kind == 'range':
        return range(*items)
    if kind == 'keys':
        return dict.fromkeys(items).keys()
    if kind == 'values':
        return dict(enumerate(items)).values()
    if kind == 'items':
        return dict(items).items()
    if kind == 'iterator':
        return iter(items)
    raise ValueError(f'{kind} is no kind of value')
