"""Weights in files: quantised on the way from one to another, and read again, block by block."""

import dataclasses
import functools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.errors import InputError
from llama_jax.ops.quantized import codes_of, scale_shape, scales_of, spread
from llama_jax.placement import BlockArray, Index
from llama_jax.quantize.forms import Form, summed_axes
from llama_jax.types import LazyArray

_INT4 = np.dtype(jnp.int4)


class Quantizing:
    """A weight in a file, quantised as it is read; what is lost is summed up on the way.

    Attributes:
      codes: int8, or bytes of two int4 each, to read once in blocks.
      scale: to read in blocks.
    """

    def __init__(self, path: str, leaf: BlockArray, form: Form):
        self.path, self.leaf, self.form = path, leaf, form
        counts = scale_shape(leaf.shape, summed_axes(path, len(leaf.shape)), form.group)
        assert counts is not None, path
        self.counts = counts
        self.is_packed = form.dtype == 'int4' and leaf.shape[-1] % 2 == 0
        self._lock = threading.Lock()
        self._squares = np.zeros(2)  # of the errors, of the weights
        self._scales = functools.lru_cache(maxsize=4)(self._scales_of_layer)
        self._layers: dict[int, threading.Lock] = {}
        shape = (*leaf.shape[:-1], leaf.shape[-1] // 2) if self.is_packed else leaf.shape
        self.codes = _Computed(tuple(shape), np.dtype('u1' if self.is_packed else 'i1'), self._read_codes)
        self.scale = _Computed(counts, np.dtype(np.float16 if form.group else np.float32), self._read_scale)

    @property
    def relative_error(self) -> float:
        """Root of the mean square of what was lost, beside that of the weights."""
        return math.sqrt(self._squares[0] / self._squares[1]) if self._squares[1] else 0.0

    @property
    def num_bytes(self) -> int:
        """Of codes and scales."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in (self.codes, self.scale))

    def _scales_of_layer(self, layer: int) -> np.ndarray:
        """float32 [1, ...] of a layer, or of a table's rows."""
        stacked = len(self.leaf.shape) > 2
        counts = (1, *self.counts[1:]) if stacked else self.counts
        found = np.empty(counts, np.float32)
        for index in self._blocks_of_layer(layer):
            values = np.asarray(self.leaf.read(index), np.float32)
            _check_finite(values, self.path)
            place = [slice(None)] if stacked else []
            for axis in range(len(place), len(counts)):
                is_whole = counts[axis] != self.leaf.shape[axis]
                place.append(slice(None) if is_whole else index[axis])
            count = [
                values.shape[a] if counts[a] == self.leaf.shape[a] else counts[a] for a in range(len(counts))
            ]
            found[tuple(place)] = self._find_scales(values, count)
        return found

    def _blocks_of_layer(self, layer: int) -> Iterable[Index]:
        """Indices that cover it as its blocks do, but of this layer alone, and whole along what a product sums over."""
        shape = self.leaf.shape
        summed, found = summed_axes(self.path, len(shape)), {}
        for index in self.leaf.blocks():
            spans = [one.indices(size)[:2] for one, size in zip(index, shape, strict=True)]
            if len(shape) > 2:
                if not spans[0][0] <= layer < spans[0][1]:
                    continue
                spans[0] = layer, layer + 1
            spans = [(0, size) if axis in summed else spans[axis] for axis, size in enumerate(shape)]
            found[tuple(spans)] = tuple(slice(*span) for span in spans)
        return found.values()

    def _find_scales(self, values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        return scales_of(values, self.form.dtype, counts)

    def _find_codes(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return codes_of(values, scale, self.form.dtype)

    def _values(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return codes * scale.astype(self.scale.dtype).astype(np.float32)

    def _scales_for(self, layer: int) -> np.ndarray:
        with self._lock:
            lock = self._layers.setdefault(layer, threading.Lock())
        with lock:
            return self._scales(layer)

    def _layers_in(self, index: Index) -> Iterable[tuple[int, Index]]:
        """(layer, the index of its part of a block)."""
        if len(self.leaf.shape) == 2:
            yield 0, index
            return
        for layer in range(*index[0].indices(self.leaf.shape[0])):
            yield layer, (slice(layer, layer + 1), *index[1:])

    def _read_codes(self, index: Index) -> np.ndarray:
        if self.is_packed:
            start, stop, _ = index[-1].indices(self.codes.shape[-1])
            index = (*index[:-1], slice(2 * start, 2 * stop))
        parts = [self._codes_of(layer, part) for layer, part in self._layers_in(index)]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _codes_of(self, layer: int, index: Index) -> np.ndarray:
        values = np.asarray(self.leaf.read(index), np.float32)
        scale = self._scales_for(layer)
        stacked = len(self.leaf.shape) > 2
        within = (slice(0, 1), *index[1:]) if stacked else index
        scale = spread(scale, (1, *self.leaf.shape[1:]) if stacked else self.leaf.shape, within)
        codes = self._find_codes(values, scale)
        lost = self._values(codes, scale) - values
        squares = [float(np.square(x, dtype=np.float64).sum()) for x in (lost, values)]
        with self._lock:
            self._squares += squares
        return pack(codes) if self.is_packed else codes

    def _read_scale(self, index: Index) -> np.ndarray:
        stacked = len(self.leaf.shape) > 2
        layers = range(*index[0].indices(self.leaf.shape[0])) if stacked else [0]
        whole = np.concatenate([self._scales_for(layer) for layer in layers])
        return whole[(slice(None), *index[1:]) if stacked else index].astype(self.scale.dtype)


def _check_finite(values: np.ndarray, path: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(
            f'weight {path} holds values that are infinite or not a number; no integers stand for them'
        )


@dataclasses.dataclass(frozen=True)
class _Computed:
    """An array whose blocks are made when they are read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Any


def pack(codes: np.ndarray) -> np.ndarray:
    """int4 codes [..., 2n], two a byte [..., n], the first in the lower half."""
    pairs = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, 2) & 15
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack(packed: np.ndarray) -> np.ndarray:
    """The int8 codes that `pack` was given."""
    halves = np.stack([packed << 4, packed & 0xF0], -1).view(np.int8) >> 4
    return halves.reshape(*packed.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes in a file, as bytes of two or one by one, read as the type that they are of."""

    stored: BlockArray
    dtype: np.dtype

    @property
    def is_packed(self) -> bool:
        """Whether a byte holds two."""
        return self.stored.dtype == np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Unpacked."""
        *others, last = self.stored.shape
        return (*others, 2 * last if self.is_packed else last)

    @property
    def rows_axis(self) -> int | None:
        """As it is stored."""
        return self.stored.rows_axis

    def blocks(self) -> Iterator[Index]:
        """As they are stored, in codes."""
        for index in self.stored.blocks():
            start, stop, _ = index[-1].indices(self.stored.shape[-1])
            yield (*index[:-1], slice(2 * start, 2 * stop)) if self.is_packed else index

    def read(self, index: Index) -> np.ndarray:
        """See `LazyArray`; unpacked."""
        if not self.is_packed:
            return self.stored.read(index).astype(self.dtype)
        start, stop, _ = index[-1].indices(self.shape[-1])
        packed = self.stored.read((*index[:-1], slice(start // 2, -(-stop // 2))))
        return unpack(packed)[..., start % 2 : start % 2 + stop - start].astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """The weight that codes and scales in files stand for, float32."""

    codes: BlockArray
    scale: LazyArray
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return tuple(self.codes.shape)

    @property
    def rows_axis(self) -> int | None:
        """Of the codes."""
        return self.codes.rows_axis

    def blocks(self) -> Iterable[Index]:
        """Of the codes."""
        return self.codes.blocks()

    def read(self, index: Index) -> np.ndarray:
        """See `LazyArray`; codes times scales."""
        spans = [s.indices(size)[:2] for s, size in zip(index, self.shape, strict=True)]
        tiles = [n // count for n, count in zip(self.shape, self.scale.shape, strict=True)]
        covering = [(a // t, -(-b // t)) for (a, b), t in zip(spans, tiles, strict=True)]
        scale = self.scale.read(tuple(slice(*span) for span in covering)).astype(np.float32)
        shape = [t * (stop - start) for t, (start, stop) in zip(tiles, covering, strict=True)]
        within = [
            slice(a - t * s, b - t * s) for (a, b), t, (s, _) in zip(spans, tiles, covering, strict=True)
        ]
        return self.codes.read(index).astype(np.float32) * spread(scale, tuple(shape), tuple(within))


def open_codes(leaves: Mapping[str, BlockArray], forms: Mapping[str, Form]) -> dict[str, BlockArray]:
    """The leaves of a checkpoint, with codes of the type that their form says.

    Raises:
      InputError: a weight that should be codes and scales is not.
    """
    opened = dict(leaves)
    for path, form in forms.items():
        codes = leaves.get(f'{path}/qvalue')
        if codes is None or f'{path}/scale' not in leaves or codes.dtype not in (np.int8, np.uint8):
            raise InputError(
                f'weight {path} should be {form}, and is not: there are no such codes and scales'
            )
        opened[f'{path}/qvalue'] = Codes(codes, np.dtype(form.dtype) if form.dtype == 'int8' else _INT4)
    return opened


def dequantized_leaves(leaves: Mapping[str, BlockArray], forms: Mapping[str, Form]) -> dict[str, BlockArray]:
    """Leaves by the paths of a model's weights, what is in integers as float32."""
    plain = dict(leaves)
    for path in forms:
        plain[path] = Dequantized(plain.pop(f'{path}/qvalue'), plain.pop(f'{path}/scale'))
    return plain
