"""A base that adapters are trained beside, as it is kept in memory: cast or quantised block by block as it is read."""

import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import InputError
from llama_jax.ops import nf4
from llama_jax.ops.quantized import spread
from llama_jax.placement import BlockArray, Index
from llama_jax.quantize.files import Dequantized, Quantizing
from llama_jax.quantize.forms import (
    DTYPES,
    NF4,
    Form,
    choose_forms,
    name_of,
    num_stacked,
    represent_all,
    summed_axes,
)
from llama_jax.types import Params

BASE_DTYPES = ('float32', 'bfloat16', *DTYPES, NF4)


def base_target(target: Params, dtype: str, stored: Mapping[str, int] = types.MappingProxyType({})) -> Params:
    """Abstract params as a base of this type has them: each weight in its representation, norms in float32.

    Args:
      target: abstract params with shardings, each weight as one array.
      dtype: one of `BASE_DTYPES`. Of nf4, which is of the layers' matrices, tables are bfloat16.
      stored: of nf4, the weights in a block by path of those that a checkpoint holds so; they stay what they are, and
        the largest values of their blocks float32.

    Raises:
      InputError: no base is kept in that type.
    """
    shapes = {name_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(target)}
    forms = _forms(shapes, dtype)
    if dtype == NF4:
        forms |= {path: Form(NF4, size, double=False) for path, size in stored.items()}

    def cast(keys: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        wanted = _float_dtype(name_of(keys), leaf.shape, dtype)
        return jax.ShapeDtypeStruct(leaf.shape, wanted, sharding=leaf.sharding)

    return represent_all(jax.tree_util.tree_map_with_path(cast, target), forms)


def base_leaves(
    leaves: Mapping[str, BlockArray],
    dtype: str,
    stored: Mapping[str, BlockArray] = types.MappingProxyType({}),
) -> dict[str, BlockArray]:
    """What `base_target` asks for, by name: quantised as its blocks are read.

    Args:
      leaves: floating point, by path of the params.
      dtype: as there.
      stored: PATH/codes and PATH/absmax of what a checkpoint holds in nf4.
    """
    made: dict[str, BlockArray] = {}
    forms = _forms({path: tuple(leaf.shape) for path, leaf in leaves.items()}, dtype)
    for path, leaf in leaves.items():
        if path not in forms:
            made[path] = leaf
        else:
            made |= _stored(path, forms[path], stored) or _quantized(path, leaf, forms[path])
    return made


def kept_leaves(
    leaves: Mapping[str, BlockArray],
    dtype: str,
    stored: Mapping[str, BlockArray] = types.MappingProxyType({}),
) -> dict[str, BlockArray]:
    """What a base of this type stands for, by path of the params: floating point with what keeping it has lost."""
    forms = _forms({path: tuple(leaf.shape) for path, leaf in leaves.items()}, dtype)
    kept: dict[str, BlockArray] = {}
    for path, leaf in leaves.items():
        if path not in forms:
            kept[path] = _Cast(leaf, np.dtype(_float_dtype(path, leaf.shape, dtype)))
            continue
        parts = _stored(path, forms[path], stored) or _quantized(path, leaf, forms[path])
        if forms[path].dtype == NF4:
            kept[path] = _Dequantized(*parts.values())
        else:
            kept[path] = Dequantized(parts[f'{path}/qvalue'], parts[f'{path}/scale'])
    return kept


def _forms(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Form]:
    if dtype not in BASE_DTYPES:
        raise InputError(f'a base is not kept as {dtype!r}; there are {", ".join(BASE_DTYPES)}')
    return choose_forms(shapes, dtype)[0] if dtype in (*DTYPES, NF4) else {}


def _stored(path: str, form: Form, stored: Mapping[str, BlockArray]) -> dict[str, BlockArray]:
    """The leaves of a weight that a checkpoint holds as it is to be; else {}."""
    names = (f'{path}/codes', f'{path}/absmax')
    return {name: stored[name] for name in names} if form.dtype == NF4 and names[0] in stored else {}


def _float_dtype(path: str, shape: Sequence[int], dtype: str) -> Any:
    """Of a weight that is not quantised: matrices and tables may be narrow, norms are float32."""
    is_narrow = dtype in ('bfloat16', NF4) and summed_axes(path, len(shape))
    return jnp.bfloat16 if is_narrow else jnp.float32


def _quantized(path: str, leaf: BlockArray, form: Form) -> dict[str, BlockArray]:
    """The leaves of the representation, in its order."""
    if form.dtype == NF4:
        nf4_of = _QuantizingNf4(path, leaf, form)
        made: dict[str, BlockArray] = {
            f'{path}/codes': _Made(tuple(leaf.shape), np.dtype(jnp.uint4), nf4_of.read_codes, leaf.blocks)
        }
        for part, (name, shape) in enumerate(nf4_of.shapes.items()):
            dtype = np.dtype(np.int8 if name == 'absmax' else np.float32)
            blocks = _layer_by_layer(shape, num_stacked(path, len(shape)))
            made[f'{path}/{name}'] = _Made(shape, dtype, nf4_of.reader_of(part), blocks)
        return made
    of = _QuantizingIntegers(path, leaf, form)
    codes = _Made(tuple(leaf.shape), np.dtype(jnp.dtype(form.dtype)), of.read_codes, leaf.blocks)
    shape = tuple(of.scale.shape)
    scale = _Made(shape, of.scale.dtype, of.scale.read, _layer_by_layer(shape, num_stacked(path, len(shape))))
    return {f'{path}/qvalue': codes, f'{path}/scale': scale}


def _layer_by_layer(shape: tuple[int, ...], stacked: int) -> Callable[[], Iterable[Index]]:
    rest = tuple(slice(0, size) for size in shape[stacked:])
    return lambda: [(slice(i, i + 1), *rest) for i in range(shape[0])] if stacked else [rest]


@dataclasses.dataclass(frozen=True)
class _Made:
    """An array whose blocks are made when they are read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[Index], np.ndarray]
    indices: Callable[[], Iterable[Index]]
    rows_axis = None

    def blocks(self) -> Iterable[Index]:
        return self.indices()

    def read(self, index: Index) -> np.ndarray:
        return self.make(index).astype(self.dtype)


class _QuantizingIntegers(Quantizing):
    """Codes one by one, for arrays in memory."""

    def __init__(self, path: str, leaf: BlockArray, form: Form):
        super().__init__(path, leaf, form)
        self.is_packed = False

    def read_codes(self, index: Index) -> np.ndarray:
        return np.concatenate([self._codes_of(layer, part) for layer, part in self._layers_in(index)])


class _QuantizingNf4(_QuantizingIntegers):
    """A weight as `ops.nf4.Nf4Array`, whose scales are its absmax.

    Attributes:
      shapes: of absmax, nested and offset.
    """

    def __init__(self, path: str, leaf: BlockArray, form: Form):
        super().__init__(path, leaf, form)
        num_axes = len(leaf.shape)
        summed, self.num_stacked = summed_axes(path, num_axes), num_stacked(path, num_axes)
        self.shapes = {
            'absmax': tuple(self.counts),
            'nested': tuple(1 if axis in summed else n for axis, n in enumerate(self.counts)),
            'offset': tuple(n if axis < self.num_stacked else 1 for axis, n in enumerate(self.counts)),
        }

    def reader_of(self, part: int) -> Callable[[Index], np.ndarray]:
        """Reads one of `shapes`, by its place."""

        def of_layer(layer: int) -> np.ndarray:
            shape = (1, *self.leaf.shape[1:]) if self.num_stacked else self.leaf.shape
            return nf4.quantize_absmax(self._scales_for(layer), shape, self.num_stacked)[part]

        def read(index: Index) -> np.ndarray:
            if not self.num_stacked:
                return of_layer(0)[index]
            layers = range(*index[0].indices(self.leaf.shape[0]))
            return np.concatenate([of_layer(layer) for layer in layers])[(slice(None), *index[1:])]

        return read

    def _find_scales(self, values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        return nf4.absmax_of(values, counts)

    def _find_codes(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return nf4.codes_of(values, scale)

    def _values(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return nf4.LEVELS[codes] * scale


@dataclasses.dataclass(frozen=True)
class _Dequantized:
    """The weight that nf4 stands for, float32."""

    codes: BlockArray
    absmax: BlockArray
    nested: BlockArray | None = None
    offset: BlockArray | None = None
    dtype = np.dtype(np.float32)
    rows_axis = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def blocks(self) -> Iterable[Index]:
        return self.codes.blocks()

    def read(self, index: Index) -> np.ndarray:
        stacked = len(self.shape) > 2

        def whole(array: BlockArray | None) -> np.ndarray | None:
            """Of the layers that the block is of."""
            if array is None:
                return None
            all_of_it = tuple(slice(0, size) for size in array.shape)
            return array.read((index[0], *all_of_it[1:]) if stacked else all_of_it)

        absmax = nf4.dequantize_absmax(*map(whole, (self.absmax, self.nested, self.offset)))
        shape = (len(absmax), *self.shape[1:]) if stacked else self.shape
        within = (slice(None), *index[1:]) if stacked else index
        return nf4.LEVELS[self.codes.read(index).astype(np.uint8)] * spread(absmax, shape, within)


@dataclasses.dataclass(frozen=True)
class _Cast:
    """A leaf in another floating-point type."""

    leaf: BlockArray
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaf.shape)

    @property
    def rows_axis(self) -> int | None:
        return self.leaf.rows_axis

    def blocks(self) -> Iterator[Index]:
        yield from self.leaf.blocks()

    def read(self, index: Index) -> np.ndarray:
        return self.leaf.read(index).astype(self.dtype)
