"""The pickles inside PyTorch's checkpoints: what they describe is made, and nothing is run.

Python's own unpickler calls what a pickle names and allocates what a damaged one asks for, so the few opcodes that
`torch.save` writes are interpreted here.
"""

import dataclasses
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llama_jax.convert.tensors import BFLOAT16, FileTensor, StridedTensor
from llama_jax.errors import InputError

STORAGES: dict[str, np.dtype | None] = {  # None: a type that no weight has
    'HalfStorage': np.dtype('<f2'),
    'BFloat16Storage': BFLOAT16,
    'FloatStorage': np.dtype('<f4'),
    'DoubleStorage': np.dtype('<f8'),
    'LongStorage': np.dtype('<i8'),
    'IntStorage': np.dtype('<i4'),
    'ShortStorage': np.dtype('<i2'),
    'CharStorage': np.dtype('i1'),
    'ByteStorage': np.dtype('u1'),
    'BoolStorage': np.dtype('?'),
    **dict.fromkeys(('ComplexFloatStorage', 'ComplexDoubleStorage', 'UntypedStorage')),
}
_MAX_EXPANSION = 1 << 20  # times; of an expanded view, whose values are in the file once
_MAX_ARGUMENTS = 16  # of a call; a tensor's has 6 or 7
MAX_NAME = 1000  # characters of a key, a storage or a class
_DTYPE_NAME = re.compile(r'(b?float|complex|u?int|q?u?int|long|half|double|bool)\w*')


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A tensor that is no weight: a scalar or other thing beside the model, or a damaged one; refused where it is used.

    Attributes:
      reason: what is wrong with it, to follow 'tensor NAME'.
    """

    reason: str


@dataclasses.dataclass(frozen=True)
class StorageType:
    """A class of storages by PyTorch's name; no type where no weight has it."""

    name: str
    dtype: np.dtype | None


@dataclasses.dataclass(frozen=True)
class Storage:
    """Values in a file that tensors are views of.

    Attributes:
      offset: in bytes.
      count: of values.
      reason: why it cannot be used, where it has no type.
    """

    path: epath.Path
    offset: int
    count: int
    dtype: np.dtype | None
    reason: str = ''


def show(value: object, limit: int = 60) -> str:
    """A foreign value on one line of a message, cut short; a container, which may hold itself, by its type alone."""
    if not isinstance(value, str | bytes | int | float):
        return f'a {type(value).__name__}'
    if isinstance(value, int) and abs(value) >= 2**64:
        return 'a huge number'
    text = ascii(value[: limit + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= limit else f'{text[:limit]}...'


def are_sizes(values: Sequence[Any]) -> bool:
    """Whether they can be sizes of axes, counts or offsets."""
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> FileTensor | StridedTensor | Unreadable:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage."""
    if not isinstance(storage, Storage):
        raise ValueError('a tensor without a storage')
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) < 16):
        raise ValueError('a tensor without a shape')
    if not are_sizes((offset, *shape, *strides)):
        raise ValueError('a tensor with a shape, strides or an offset that are no sizes')
    if storage.dtype is None:
        return Unreadable(storage.reason)
    if len(shape) not in (1, 2):
        return Unreadable(f'has {len(shape)} axes; weights have one or two')
    row_major = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and offset + reach > storage.count:
        return Unreadable(
            f'of shape {shape} at {offset} does not fit into its storage of {storage.count} values'
        )
    place = storage.offset + offset * storage.dtype.itemsize
    if any(
        size > 1 and stride != dense for size, stride, dense in zip(shape, strides, row_major, strict=True)
    ):
        if math.prod(shape) > _MAX_EXPANSION * storage.count:
            return Unreadable(f'of shape {shape} repeats the {storage.count} values of its storage too often')
        return StridedTensor(storage.path, place, shape, strides, storage.dtype)
    return FileTensor(storage.path, place, shape, storage.dtype)


def _rebuild_tensor_of_dtype(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Unreadable:
    """`torch._utils._rebuild_tensor_v3`: of the newer types, float8 among them."""
    return Unreadable(f'is of type {show(rest[2])}; weights are float16, bfloat16 or float32')


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ('collections', 'OrderedDict'): lambda: {},
    ('torch', 'Size'): lambda sizes: sizes,
    ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v3'): _rebuild_tensor_of_dtype,
}


def _global(module: str, name: str) -> Any:
    if function := _FUNCTIONS.get((module, name)):
        return function
    if module in ('torch', 'torch.storage') and name in STORAGES:
        return StorageType(name, STORAGES[name])
    if module == 'torch' and _DTYPE_NAME.fullmatch(name):
        return name
    raise InputError(f'its pickle asks for {show(f"{module}.{name}")[1:-1]}; a checkpoint holds tensors only')


# Opcodes by their byte: without an argument, with a number, and with that many bytes of text, or of an integer.
_PLAIN = {
    ord(byte): name
    for byte, name in zip(
        '().NR]}abetsu0Q\x85\x86\x87\x88\x89\x93\x94',
        (
            *('MARK', 'EMPTY_TUPLE', 'STOP', 'NONE', 'REDUCE', 'EMPTY_LIST', 'EMPTY_DICT', 'APPEND', 'BUILD'),
            *('APPENDS', 'TUPLE', 'SETITEM', 'SETITEMS', 'POP', 'BINPERSID', 'TUPLE1', 'TUPLE2', 'TUPLE3'),
            *('NEWTRUE', 'NEWFALSE', 'STACK_GLOBAL', 'MEMOIZE'),
        ),
        strict=True,
    )
}
_NUMBERS = {
    **{
        ord('K'): ('VALUE', '<B'),
        ord('M'): ('VALUE', '<H'),
        ord('J'): ('VALUE', '<i'),
        ord('G'): ('VALUE', '>d'),
    },
    **{ord('q'): ('PUT', '<B'), ord('r'): ('PUT', '<I'), ord('h'): ('GET', '<B'), ord('j'): ('GET', '<I')},
    **{0x80: ('PROTO', '<B'), 0x95: ('FRAME', '<Q')},
}
_TEXTS = {ord('X'): '<I', ord('U'): '<B', ord('T'): '<I', 0x8C: '<B', 0x8D: '<Q'}
_INTEGERS = {0x8A: '<B', 0x8B: '<I'}


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    """Names and arguments; pickletools.genops would accept more, and take three times as long."""
    at = 0
    while at < len(data):
        code = data[at]
        at += 1
        if code in _PLAIN:
            yield _PLAIN[code], None
        elif code in _NUMBERS:
            name, kind = _NUMBERS[code]
            (number,) = struct.unpack_from(kind, data, at)
            at += struct.calcsize(kind)
            yield name, number
        elif kind := _TEXTS.get(code) or _INTEGERS.get(code):
            at += struct.calcsize(kind)
            (length,) = struct.unpack_from(kind, data, at - struct.calcsize(kind))
            if length > len(data) - at:
                raise ValueError('a text beyond its end')
            content = data[at : at + length]
            at += length
            is_text = code in _TEXTS
            yield 'VALUE', content.decode() if is_text else int.from_bytes(content, 'little', signed=True)
        elif code == ord('c'):
            names = data[at : at + 400].split(b'\n', 2)
            at += len(names[0]) + len(names[1]) + 2
            yield 'GLOBAL', (names[0].decode(), names[1].decode())
        else:
            raise ValueError(f'opcode {code}')


def load(data: bytes, open_storage: Callable[[Any], Storage]) -> Any:
    """Runs a pickle on a stack and a memo of its own; both grow by one reference an opcode at most.

    Each opcode takes a time of its own, not of what it is applied to. So calls have few arguments, and keys of dicts
    are short texts and small numbers: nested tuples are hashed piece by piece, large numbers can all have the same
    hash, and long texts that are equal are compared to their ends.

    Args:
      data: the pickle.
      open_storage: finds what a persistent id stands for.

    Raises:
      InputError: it asks for what is not known here.
      ValueError, LookupError, TypeError, struct.error: it is not valid.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # what lies under each mark
    memo: dict[int, Any] = {}
    constants = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
    lengths = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
    for opcode, argument in _opcodes(data):
        match opcode:
            case 'PROTO' | 'FRAME':
                pass
            case 'VALUE':
                stack.append(argument)
            case 'NONE' | 'NEWTRUE' | 'NEWFALSE' | 'EMPTY_TUPLE' as name:
                stack.append(constants[name])
            case 'EMPTY_DICT':
                stack.append({})
            case 'EMPTY_LIST':
                stack.append([])
            case 'MARK':
                below.append(stack)
                stack = []
            case 'TUPLE':
                values, stack = stack, below.pop()
                stack.append(tuple(values))
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3' as name:
                values = [stack.pop() for _ in range(lengths[name])]
                stack.append(tuple(values[::-1]))
            case 'APPEND':
                value = stack.pop()
                _extend(stack[-1], [value])
            case 'APPENDS':
                values, stack = stack, below.pop()
                _extend(stack[-1], values)
            case 'SETITEM':
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case 'SETITEMS':
                values, stack = stack, below.pop()
                _update(stack[-1], values)
            case 'PUT':
                memo[argument] = stack[-1]
            case 'MEMOIZE':
                memo[len(memo)] = stack[-1]
            case 'GET':
                stack.append(memo[argument])
            case 'GLOBAL':
                stack.append(_global(*argument))
            case 'STACK_GLOBAL':
                name, module = stack.pop(), stack.pop()
                if not (isinstance(module, str) and isinstance(name, str) and len(module + name) <= MAX_NAME):
                    raise ValueError('a global without a name')
                stack.append(_global(module, name))
            case 'REDUCE':
                arguments, function = stack.pop(), stack.pop()
                if not any(function is known for known in _FUNCTIONS.values()):
                    raise ValueError('a call of what is no function')
                if not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
                    raise ValueError('a call with arguments that no tensor needs')
                stack.append(function(*arguments))
            case 'POP':
                stack.pop()
            case 'BUILD':  # a state dict's version of each module
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError('state for what is no dict')
            case 'BINPERSID':
                stack.append(open_storage(stack.pop()))
            case 'STOP':
                return stack.pop()
    raise ValueError('no end')


def _extend(target: Any, values: list[Any]) -> None:
    if not isinstance(target, list):
        raise ValueError('items for what is no list')
    target.extend(values)


def _update(target: Any, values: list[Any]) -> None:
    keys = values[::2]
    if not isinstance(target, dict) or len(values) % 2:
        raise ValueError('items for what is no dict')
    if any(isinstance(key, str) and len(key) > MAX_NAME for key in keys):
        raise ValueError(f'a key of more than {MAX_NAME} characters')
    if not all(isinstance(key, str) or (type(key) is int and abs(key) < 2**32) for key in keys):
        raise ValueError('a key that is neither text nor a small number')
    target.update(zip(keys, values[1::2], strict=True))


def dump(tensors: Mapping[str, tuple[Sequence[int], np.dtype]], keys: Mapping[str, str]) -> bytes:
    """The pickle, protocol 2 as `torch.save` writes it, of a state dict.

    Args:
      tensors: shape and type by name.
      keys: of each tensor's storage, which it fills; several may share one.
    """
    names = {dtype: name for name, dtype in STORAGES.items() if dtype is not None}
    parts = [b'\x80\x02}(']
    for name, (shape, dtype) in tensors.items():
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        parts += [
            *(_text(name), b'ctorch._utils\n_rebuild_tensor_v2\n('),
            *(b'(', _text('storage'), f'ctorch\n{names[dtype]}\n'.encode(), _text(keys[name]), _text('cpu')),
            *(_number(math.prod(shape)), b'tQ', _number(0)),
            *(b'(', *map(_number, shape), b't(', *map(_number, strides), b't'),
            b'\x89ccollections\nOrderedDict\n)RtR',
        ]
    return b''.join([*parts, b'u.'])


def _text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def _number(value: int) -> bytes:
    return b'J' + struct.pack('<i', value) if value < 2**31 else b'\x8a\x08' + struct.pack('<q', value)
