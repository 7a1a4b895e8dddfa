"""What a GGUF holds as Q8_0 or Q4_0, as the integers and scales that they are: nothing is rounded a second time.

Both are blocks of 32 weights along a row, a float16 scale in front; rows of a matrix [out, in] are along what a product
sums over, so that blocks are groups of `ops.quantized`. Interleaved heads permute rows, codes and scales alike.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from llama_jax.convert.codes import counts_of, part_leaf
from llama_jax.convert.gguf_file import QuantizedTensor
from llama_jax.convert.mapping import Source, weights_of
from llama_jax.convert.tensors import ALL, HalfSplit, Tensor
from llama_jax.placement import BlockArray

_GROUP = 32
_DTYPES = {'Q8_0': np.dtype(np.int8), 'Q4_0': np.dtype(jnp.int4)}


def stored_forms(source: Source) -> dict[str, tuple[str, int]]:
    """(dtype, group) by path of the weights that are integers in all layers, alike."""
    found = {}
    for weight in weights_of(source.config):
        kinds = {_kind(tensor) for tensor in source.tensors[weight.path]}
        if len(kinds) == 1 and (kind := kinds.pop()) and counts_of(weight, source, _GROUP):
            found[weight.path] = _DTYPES[kind].name, _GROUP
    return found


def stored_codes(source: Source) -> dict[str, BlockArray]:
    """Their codes and scales in the layout of our params, as `PATH/qvalue` and `PATH/scale`."""
    found: dict[str, BlockArray] = {}
    for weight in weights_of(source.config):
        if weight.path not in stored_forms(source):
            continue
        tensors = source.tensors[weight.path]
        for name, kind in (('qvalue', _Codes), ('scale', _Scales)):
            counts = counts_of(weight, source, _GROUP) if name == 'scale' else None
            parts = [_of_blocks(tensor, kind) for tensor in tensors]
            found[f'{weight.path}/{name}'] = part_leaf(weight, source, parts, counts)
    return found


def _blocks_in(tensor: Tensor) -> QuantizedTensor | None:
    tensor = tensor.interleaved if isinstance(tensor, HalfSplit) else tensor
    return tensor if isinstance(tensor, QuantizedTensor) else None


def _kind(tensor: Tensor) -> str:
    blocks = _blocks_in(tensor)
    return blocks.info.type.name if blocks and blocks.info.type.name in _DTYPES else ''


def _of_blocks(tensor: Tensor, kind: type) -> Tensor:
    part = kind(_blocks_in(tensor))
    return dataclasses.replace(tensor, interleaved=part) if isinstance(tensor, HalfSplit) else part


@dataclasses.dataclass(frozen=True)
class _Codes:
    """The integers of a matrix."""

    tensor: QuantizedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return _DTYPES[self.tensor.info.type.name]

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        first, last, _ = columns.indices(self.shape[1])
        blocks = self.tensor.read_blocks(rows, columns)
        if self.dtype == np.int8:
            codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
        else:  # the first half of a block in the lower halves of its bytes; 8 stands for 0
            halves = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
            codes = halves.view(np.int8) - np.int8(8)
        begin = first - first // _GROUP * _GROUP
        codes = codes.reshape(len(codes), -1)[:, begin : begin + max(last - first, 0)]
        return codes.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class _Scales:
    """The scales of a matrix, one for each block of a row."""

    tensor: QuantizedTensor
    dtype = np.dtype(np.float16)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[0], self.tensor.shape[1] // _GROUP

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        first, last, _ = columns.indices(self.shape[1])
        blocks = self.tensor.read_blocks(rows, slice(first * _GROUP, last * _GROUP))
        return np.ascontiguousarray(blocks[..., :2]).view('<f2')[..., 0]
