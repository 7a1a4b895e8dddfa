"""Weights of 4 bits in safetensors, as transformers saves them with bitsandbytes: read as what they stand for.

Of a matrix `X` [out, in], flattened row by row, a file holds the codes (two a byte, the first in the upper half), and
`X.absmax`, the largest weight of each block of 64 or so. `weight = level[code] * absmax` in float32, then in the type
that the weight had. Absmax may itself be codes of 8 bits (double quantisation): `absmax = map[code] * nested + offset`,
with a `nested` for every 256 blocks. Numbers and names stand in the JSON text `X.quant_state.bitsandbytes__nf4`.
Source: bitsandbytes/functional.py, the state of a quantised array and `dequantize_4bit`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.convert.codes import counts_of, part_leaf
from llama_jax.convert.mapping import Source, weights_of
from llama_jax.convert.tensors import ALL, BFLOAT16, FileTensor, Tensor, row_blocks
from llama_jax.errors import InputError, did_you_mean
from llama_jax.json_file import parse_object, show_json
from llama_jax.placement import BlockArray

# fmt: off
_LEVELS = {
    'nf4': np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ], np.float32),
    'fp4': np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}
# fmt: on
_STATE = '.quant_state.bitsandbytes__'
_DTYPES = {
    'float32': np.dtype(np.float32),
    'float16': np.dtype(np.float16),
    'bfloat16': BFLOAT16,
}
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MAX_STATE = 64 << 10  # bytes; a real one has 200
_STRIP_BYTES = 4 << 20  # of float32, at once


def with_whole_weights(found: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Tensors by name, in which each matrix of 4 bits, with all that belongs to it, has become one of numbers.

    Args:
      found: every tensor of a folder; those of 4 bits are bytes.
      origin: the folder, for messages.

    Raises:
      InputError: what belongs to a matrix is missing, surplus, damaged or contradicts the rest; it is named.
    """
    left, whole = dict(found), {}
    for name in [name for name in found if _STATE in name]:
        matrix, _, kind = name.partition(_STATE)
        whole[matrix] = _opened(left, matrix, kind, f'{origin}: tensor {name}')
    for name in left:
        base, _, part = name.rpartition('.')
        if part in ('absmax', 'quant_map', 'nested_absmax', 'nested_quant_map', 'SCB') or name in whole:
            near = did_you_mean(f'{base}{_STATE}nf4', [name for name in found if _STATE in name])
            raise InputError(
                f'{origin}: tensor {name} belongs to no matrix of 4 bits; of each there is one description, '
                f'{base}{_STATE}nf4 or fp4: {near}'
            )
    return left | whole


def _opened(left: dict[str, Tensor], matrix: str, kind: str, where: str) -> Tensor:
    """The matrix of this name, whose tensors are taken out of `left`."""
    levels = _LEVELS.get(kind)
    if levels is None:
        raise InputError(f'{where} is of a kind that is not known; there are {", ".join(_LEVELS)}')
    state = _read_state(left.pop(f'{matrix}{_STATE}{kind}'), where)
    shape, size, dtype = _checked(state, kind, where)
    count = math.prod(shape)

    def take(name: str, length: int, dtype: np.dtype) -> FileTensor:
        tensor = left.pop(name, None)
        if tensor is None:
            raise InputError(f'{where} has no {name} beside it; {did_you_mean(name, left)}')
        if not isinstance(tensor, FileTensor):
            raise InputError(f'{where}: 4 bits are read from safetensors, {name} lies in another format')
        if dtype == np.uint8 and name == matrix:  # may be stored as another type, two or four bytes a value
            bytes_ = math.prod(tensor.shape) * tensor.dtype.itemsize
            tensor = dataclasses.replace(tensor, shape=(bytes_,), dtype=dtype)
        if tensor.dtype != dtype or math.prod(tensor.shape) != length:
            raise InputError(
                f'{where}: {name} has {math.prod(tensor.shape)} values of {tensor.dtype}, '
                f'a matrix {list(shape)} in blocks of {size} needs {length} of {dtype}'
            )
        return dataclasses.replace(tensor, shape=(length,))

    codes = take(matrix, -(-count // 2), np.dtype(np.uint8))
    blocks = -(-count // size)
    table = take(f'{matrix}.quant_map', 16, np.dtype(np.float32)).read()
    if not np.array_equal(table, levels):
        raise InputError(f'{where}: {matrix}.quant_map are not the levels of {kind}; the file is damaged')
    if f'{matrix}.nested_absmax' not in left:
        absmax = take(f'{matrix}.absmax', blocks, np.dtype(np.float32))
        return FourBit(codes, shape, dtype, levels, size, absmax.read)
    nested, offset = _checked_nested(state, where)
    twice = _Nested(
        take(f'{matrix}.absmax', blocks, np.dtype(np.uint8)),
        take(f'{matrix}.nested_absmax', -(-blocks // nested), np.dtype(np.float32)),
        take(f'{matrix}.nested_quant_map', 256, np.dtype(np.float32)).read(),
        nested,
        offset,
    )
    return FourBit(codes, shape, dtype, levels, size, twice.read)


def _read_state(tensor: Tensor, where: str) -> dict[str, Any]:
    if tensor.dtype != np.uint8 or len(tensor.shape) != 1 or tensor.shape[0] > _MAX_STATE:
        raise InputError(
            f'{where} is {tensor.dtype} of shape {list(tensor.shape)}; it must be a text of up to {_MAX_STATE} bytes'
        )
    return parse_object(tensor.read().tobytes(), where)


def _checked(state: dict[str, Any], kind: str, where: str) -> tuple[tuple[int, int], int, np.dtype]:
    """(shape, size of a block, type) that a description states."""
    shape, size, dtype = (state.get(key) for key in ('shape', 'blocksize', 'dtype'))
    if state.get('quant_type') != kind:
        raise InputError(f'{where} has quant_type {show_json(state.get("quant_type"))}, its name says {kind}')
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or any(type(n) is not int or not 1 <= n < 2**31 for n in shape)
    ):
        raise InputError(f'{where} has shape {show_json(shape)}, it must be the two sizes of a matrix')
    if type(size) is not int or size not in _BLOCK_SIZES:
        raise InputError(
            f'{where} has blocksize {show_json(size)}, it must be one of {", ".join(map(str, _BLOCK_SIZES))}'
        )
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(f'{where} has dtype {show_json(dtype)}, it must be one of {", ".join(_DTYPES)}')
    return (shape[0], shape[1]), size, _DTYPES[dtype]


def _checked_nested(state: dict[str, Any], where: str) -> tuple[int, np.float32]:
    """(how many blocks share a scale of the scales, what is added to these) that a description states."""
    size, offset = state.get('nested_blocksize'), state.get('nested_offset')
    if type(size) is not int or size not in _BLOCK_SIZES:
        raise InputError(
            f'{where} has nested_blocksize {show_json(size)}, it must be one of {", ".join(map(str, _BLOCK_SIZES))}'
        )
    if not isinstance(offset, int | float) or isinstance(offset, bool) or abs(offset) > 3e38:
        raise InputError(f'{where} has nested_offset {show_json(offset)}, it must be a number')
    return size, np.float32(offset)


def stored_blocks(source: Source) -> dict[str, int]:
    """The weights in a block by path of those that are nf4 in all layers, alike, in blocks that ours could have."""
    found = {}
    for weight in weights_of(source.config):
        tensors = source.tensors[weight.path]
        sizes = {
            tensor.size
            if isinstance(tensor, FourBit) and np.array_equal(tensor.levels, _LEVELS['nf4'])
            else 0
            for tensor in tensors
        }
        size = sizes.pop()
        if not sizes and size and not tensors[0].shape[1] % size and counts_of(weight, source, size):
            found[weight.path] = size
    return found


def stored_codes(source: Source) -> dict[str, BlockArray]:
    """Their codes and largest values, nothing rounded again, as `PATH/codes` and `PATH/absmax` of our layout."""
    found: dict[str, BlockArray] = {}
    for weight in weights_of(source.config):
        if (size := stored_blocks(source).get(weight.path)) is None:
            continue
        matrices: Any = source.tensors[weight.path]
        codes: list[Any] = [_RowByRow(one.shape, np.dtype(jnp.uint4), one.read_codes) for one in matrices]
        largest: list[Any] = [
            _RowByRow((one.shape[0], one.shape[1] // size), np.dtype(np.float32), one.absmax)
            for one in matrices
        ]
        found[f'{weight.path}/codes'] = part_leaf(weight, source, codes)
        found[f'{weight.path}/absmax'] = part_leaf(weight, source, largest, counts_of(weight, source, size))
    return found


@dataclasses.dataclass(frozen=True)
class _RowByRow:
    """A matrix of what is read by its places, row after row."""

    shape: tuple[int, int]
    dtype: np.dtype
    read_places: Callable[[slice], np.ndarray]

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        width = self.shape[1]
        found = self.read_places(slice(start * width, max(start, stop) * width))
        return found.reshape(-1, width)[:, columns].astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class _Nested:
    """Scales of blocks that are codes themselves."""

    codes: FileTensor
    scales: FileTensor
    levels: np.ndarray
    size: int
    offset: np.float32

    def read(self, blocks: slice) -> np.ndarray:
        first = blocks.start // self.size
        scales = np.repeat(self.scales.read(slice(first, -(-blocks.stop // self.size))), self.size)
        begin = blocks.start - first * self.size
        codes = self.codes.read(blocks)
        return self.levels[codes] * scales[begin : begin + len(codes)] + self.offset


@dataclasses.dataclass(frozen=True, eq=False)
class FourBit:
    """A matrix of 4 bits, read as numbers in the type that it had before.

    Attributes:
      codes: two a byte.
      shape: [out, in].
      dtype: of what is read.
      levels: what a code stands for, float32 [16].
      size: of a block.
      absmax: the scales of a slice of blocks, float32.
    """

    codes: FileTensor
    shape: tuple[int, int]
    dtype: np.dtype
    levels: np.ndarray
    size: int
    absmax: Callable[[slice], np.ndarray]

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`."""
        start, stop, _ = rows.indices(self.shape[0])
        first, last, _ = columns.indices(self.shape[1])
        block = np.empty((max(stop - start, 0), max(last - first, 0)), self.dtype)
        strips = row_blocks((len(block), self.shape[1]), np.dtype(np.float32), limit=_STRIP_BYTES)
        for strip in strips if block.size else ():
            whole = self._rows(start + strip.start, start + strip.stop)
            with np.errstate(over='ignore'):  # beyond float16, as bitsandbytes has it
                block[strip] = whole[:, first:last]
        return block

    def read_codes(self, places: slice) -> np.ndarray:
        """uint8, of the weights at such places, row by row."""
        pairs = self.codes.read(slice(places.start // 2, -(-places.stop // 2)))
        first = places.start % 2
        return np.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[first : first + places.stop - places.start]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [rows, in]."""
        width = self.shape[1]
        begin, end = start * width, stop * width
        codes = self.read_codes(slice(begin, end))
        first = begin // self.size
        scales = np.repeat(self.absmax(slice(first, -(-end // self.size))), self.size)
        begin -= first * self.size
        with np.errstate(all='ignore'):  # a scale may be infinite or not a number, as any weight may
            values = self.levels[codes] * scales[begin : begin + len(codes)]
        return values.reshape(stop - start, width)
