"""Weights as integers with scales, a `Representation` of `ops.linear`: int8, or int4 at half a byte.

`weight = qvalue * scale`, a scale for each output channel, or for each group of consecutive weights along what a
product sums over. Fields, codes and scales are those of qwix's `QArray` (github.com/google/qwix), without zero points.
Rounding is symmetric: `scale = max |w| / (largest code + 1/2)`, so that the outermost codes are used as much as any;
of int4 the 0.8, 0.9 or 1.0 times of that with the least squared error, in qwix's words calibrated by `absmax,0.8`.
The many scales of groups are float16, as GGUF's.

int4 is `jnp.int4`: an array of JAX keeps two in a byte on CPU, GPU and TPU, and TPUs and GPUs convert it within a
product. XLA's CPU would convert it one value at a time; there a matrix is first seen as bytes, which is a copy of it at
half a byte a weight, and taken apart by shifts. Of a loop of steps XLA makes the copies of all matrices before it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.ops import few_rows_gpu, tiles_cpu
from llama_jax.partitioning import Partitioner

# Largest code of each type.
CODE_MAX = {'int8': 127, 'int4': 7}
# Of the largest weight of a scale: what the outermost codes stand for. Where codes are few, cutting the largest weights
# may cost less than coarser steps for all the others; each group has that of these shares with the least squared error.
SHARES = {'int8': (1.0,), 'int4': (1.0, 0.9, 0.8)}
# Of the float32 that a CPU makes of a piece of a weight: it stays in the cache, and is gone when the next is made.
_TILE_BYTES = 256 << 10
# A sum over fewer rows of a weight than this costs more than its products where many activations are multiplied.
_MAX_TILE_ROWS = 256


@flax.struct.dataclass
class QuantizedArray:
    """A weight as integers with scales.

    Attributes:
      qvalue: int8 or int4, of the weight's shape.
      scale: of as many axes: along each, one value for every `shape / scale.shape` consecutive weights.
    """

    qvalue: Int[Array, '...']
    scale: Float[Array, '...']

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.qvalue.shape

    def materialize(self) -> Float[Array, '...']:
        """The weight in float32."""
        return _dequantized(self.qvalue, self.scale)

    def einsum(
        self, equation: str, x: Float[Array, '...'], output_dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, '...']:
        """As `ops.linear.einsum`; sums are float32, and a scale stands behind them where one is enough for each."""
        operands, out = equation.split('->')
        of_x, of_weight = operands.split(',')
        summed = tuple(axis for axis, letter in enumerate(of_weight) if letter not in out)
        others = [letter for letter in of_x if letter in out]
        assert out == ''.join([*others, *(letter for letter in of_weight if letter in out)]), equation
        dtype = jnp.dtype(x.dtype if output_dtype is None else output_dtype)

        def product(x, qvalue, scale):
            def fused(x, qvalue, scale):
                return _fused_product(equation, x, qvalue, scale, summed).astype(dtype)

            def tiled(x, qvalue, scale):
                return _tiled_product(x, qvalue, scale, summed, len(others)).astype(dtype)

            def on_gpu(x, qvalue, scale):
                # XLA would gather what several devices have, as it does not look into the kernel.
                y = None if jax.device_count() > 1 else few_rows(x, qvalue, scale, summed, len(others))
                return fused(x, qvalue, scale) if y is None else y.astype(dtype)

            return jax.lax.platform_dependent(x, qvalue, scale, cpu=tiled, cuda=on_gpu, default=fused)

        return frozen_product(equation, product, _dequantized, x, (self.qvalue, self.scale))

    def take(
        self, rows: Int[Array, 'B T'], dtype: jax.typing.DTypeLike, partitioner: Partitioner | None
    ) -> Float[Array, 'B T D']:
        """As `ops.linear.take`, where what a product sums over are the columns, as those of the tables."""
        qvalue, scale = self.qvalue, self.scale
        assert scale.shape[0] == qvalue.shape[0], (qvalue.shape, scale.shape)
        if partitioner is not None:  # as there
            qvalue, scale = (partitioner.shard(x, ('vocab', 'act_embed'), 'embed') for x in (qvalue, scale))
        return _dequantized(*(jnp.take(x, rows, axis=0) for x in (qvalue, scale))).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def frozen_product(equation, product, dequantized, x, parts):
    """`product(x, *parts)`, with the gradient of x alone: by the weight that the parts stand for, made anew for it.

    Args:
      equation: of activations and weight.
      product: of x and the weight.
      dequantized: the weight, of its parts.
      x: activations.
      parts: of the weight, arrays or None; they have no gradient.
    """
    return product(x, *parts)


def _forward(equation, product, dequantized, x, parts):
    del equation, dequantized
    return product(x, *parts), (parts, jnp.zeros(0, x.dtype))


def _backward(equation, product, dequantized, residuals, gradient):
    del product
    parts, like = residuals
    operands, out = equation.split('->')
    of_x, of_weight = operands.split(',')
    weight = dequantized(*parts).astype(like.dtype)
    return jnp.einsum(f'{out},{of_weight}->{of_x}', gradient.astype(like.dtype), weight), None


frozen_product.defvjp(_forward, _backward)


def scale_shape(shape: Sequence[int], summed: Sequence[int], group: int) -> tuple[int, ...] | None:
    """Of the scales of a weight; None where its groups would not be whole.

    Args:
      shape: of the weight.
      summed: its axes that a product sums over, from the first to the last, of which each is as long as all behind it.
      group: how many consecutive weights along them share a scale; 0: all, one scale an output channel.
    """
    counts = list(shape)
    left = group or math.prod(shape[axis] for axis in summed)
    for axis in reversed(summed):
        whole, part = max(left, shape[axis]), min(left, shape[axis])
        if whole % part:
            return None
        counts[axis] = shape[axis] // part
        left //= part
    return tuple(counts) if left == 1 else None


def quantize_array(
    weight: Float[Array, '...'], dtype: str, summed: Sequence[int], group: int = 0
) -> QuantizedArray:
    """The weight in codes of a type, a key of `CODE_MAX`; what a group must be is in `scale_shape`."""
    counts = scale_shape(weight.shape, summed, group)
    assert counts is not None, (weight.shape, group)
    scale = scales_of(weight.astype(jnp.float32), dtype, counts)
    codes = codes_of(weight.astype(jnp.float32), scale, dtype)
    return QuantizedArray(codes.astype(dtype), scale.astype(jnp.float16 if group else jnp.float32))


def scales_of(weight: Any, dtype: str, counts: Sequence[int]) -> Any:
    """float32 scales, so many along each axis, of float32 weights in NumPy or JAX."""
    xp = weight.__array_namespace__()
    split, within = _split(weight.shape, counts), tuple(range(1, 2 * weight.ndim, 2))
    largest = abs(weight.reshape(split)).max(axis=within).reshape(counts)
    best, least = None, None
    for share in SHARES[dtype]:
        scale = largest * np.float32(share) / (CODE_MAX[dtype] + 0.5)
        scale = xp.where(scale < math.sqrt(np.finfo(np.float32).tiny), np.float32(1), scale)
        if len(SHARES[dtype]) == 1:
            return scale
        lost = codes_of(weight, scale, dtype).reshape(split) * _beside_parts(scale) - weight.reshape(split)
        error = (lost * lost).sum(axis=within).reshape(counts)
        best = scale if best is None else xp.where(error < least, scale, best)
        least = error if least is None else xp.minimum(error, least)
    return best


def codes_of(weight: Any, scale: Any, dtype: str) -> Any:
    """int8 codes of float32 weights in NumPy or JAX, by scales of as many axes."""
    most = CODE_MAX[dtype]
    parts = weight.reshape(_split(weight.shape, scale.shape)) / _beside_parts(scale)
    # As qwix: the half that a largest weight has more than its code is rounded away or cut.
    return parts.round().clip(-most - 1, most).astype(np.int8).reshape(weight.shape)


def spread(scale: Any, shape: Sequence[int], index: tuple[slice, ...] = ()) -> Any:
    """Scales in NumPy or JAX, each as often as it stands for a weight of `shape`; the slices `index` of them."""
    xp = scale.__array_namespace__()
    return xp.broadcast_to(_beside_parts(scale), _split(shape, scale.shape)).reshape(tuple(shape))[index]


def _split(shape: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Every axis as two: how many scales lie along it, and the weights that share each."""
    return [size for n, count in zip(shape, counts, strict=True) for size in (count, n // count)]


def _beside_parts(scale: Any) -> Any:
    return scale.reshape([size for count in scale.shape for size in (count, 1)])


def _dequantized(qvalue: Array, scale: Array) -> Float[Array, '...']:
    return qvalue.astype(jnp.float32) * spread(scale.astype(jnp.float32), qvalue.shape)


def _fused_product(
    equation: str, x: Array, qvalue: Array, scale: Array, summed: tuple[int, ...]
) -> Float[Array, '...']:
    """The product where the compiler converts a weight while it multiplies."""
    if any(scale.shape[axis] > 1 for axis in summed):
        weight = _dequantized(qvalue, scale).astype(x.dtype)
        return jnp.einsum(equation, x, weight, preferred_element_type=jnp.float32)
    y = jnp.einsum(equation, x, qvalue.astype(x.dtype), preferred_element_type=jnp.float32)
    channels = scale.astype(jnp.float32).squeeze(summed)
    return y * channels.reshape([1] * (y.ndim - channels.ndim) + list(channels.shape))


def few_rows(
    x: Array, qvalue: Array, scale: Array, summed: tuple[int, ...], num_others: int, interpret: bool = False
) -> Float[Array, '...'] | None:
    """The product by the kernel for few activations on a GPU; None where that is for other shapes."""
    rows = x.reshape(math.prod(x.shape[:num_others]), -1)
    if summed[0] or any(scale.shape[axis] > 1 for axis in summed):
        return None
    codes = qvalue.reshape(rows.shape[1], -1)
    if not few_rows_gpu.fits(rows, codes):
        return None
    y = few_rows_gpu.few_rows_product(rows, codes, interpret) * scale.astype(jnp.float32).reshape(1, -1)
    return y.reshape(*x.shape[:num_others], *qvalue.shape[len(summed) :])


def _tiled_product(
    x: Array, qvalue: Array, scale: Array, summed: tuple[int, ...], num_others: int
) -> Float[Array, '...']:
    """The product where a dot would first write the whole weight in float32: a part of it at a time, in the cache."""
    kept = [size for axis, size in enumerate(qvalue.shape) if axis not in summed]
    rows = x.reshape(math.prod(x.shape[:num_others]), -1).astype(jnp.float32)
    first = summed[0] == 0
    sizes = (rows.shape[1], -1) if first else (-1, rows.shape[1])
    of_scales = math.prod(scale.shape[axis] for axis in summed)
    scales = scale.astype(jnp.float32).reshape((of_scales, -1) if first else (-1, of_scales))
    product = _sum_over_tiles if first else _tiles_side_by_side
    return product(rows, qvalue.reshape(sizes), scales).reshape(*x.shape[:num_others], *kept)


def _sum_over_tiles(x: Float[Array, 'B D'], codes: Int[Array, 'D F'], scale: Float[Array, 'S F']) -> Array:
    (num_rows, size), num_out = x.shape, codes.shape[1]
    group = size // scale.shape[0]
    is_paired = codes.dtype == jnp.int4 and num_out % 2 == 0
    planes = 2 if is_paired else 1
    codes = _as_bytes(codes) if is_paired else codes
    unit = 1 if scale.shape[0] == 1 else group
    scales = scale.reshape(scale.shape[0], 1, num_out // planes, planes)

    def add_tile(sums: tuple, start: Array | int, length: int) -> tuple:
        tile = jax.lax.dynamic_slice_in_dim(codes, start, length)
        part = jax.lax.dynamic_slice_in_dim(x, start, length, 1)
        if unit > 1:
            of_tile = jax.lax.dynamic_slice_in_dim(scales, start // unit, length // unit)
        added = []
        for plane, values in enumerate(_planes(tile, is_paired)):
            if unit > 1:
                values = values.reshape(length // unit, unit, -1) * of_tile[..., plane]
            added.append(sums[plane] + part @ values.reshape(length, -1))
        return tuple(added)

    wanted = max(_TILE_BYTES // (4 * num_out), min(num_rows, _MAX_TILE_ROWS))
    zeros = jnp.zeros((num_rows, num_out // planes), jnp.float32)
    sums = tiles_cpu.over_tiles(size, unit, wanted, add_tile, (zeros,) * planes)
    y = jnp.stack(sums, -1).reshape(num_rows, num_out)
    return y if unit > 1 else y * scale


def _tiles_side_by_side(
    x: Float[Array, 'B D'], codes: Int[Array, 'V D'], scale: Float[Array, 'V S']
) -> Array:
    num_out, size = codes.shape
    group = size // scale.shape[1]
    if codes.dtype == jnp.int8 and len(x) <= tiles_cpu.FEW_ROWS:
        if group == size:
            return tiles_cpu.few_rows_product(x, [codes], lambda codes: codes.astype(jnp.float32), scale)
        return tiles_cpu.few_rows_product(x, [codes, scale], _dequantized)
    is_paired = codes.dtype == jnp.int4 and group % 2 == 0
    planes = 2 if is_paired else 1
    codes = _as_bytes(codes) if is_paired else codes
    parts = x.reshape(x.shape[0], size // planes, planes)

    def floats(tile: Array, *of_tile: Array) -> list[Array]:
        values = _planes(tile, is_paired)
        if not of_tile:
            return values
        groups = [plane.reshape(len(tile), scale.shape[1], -1) * of_tile[0][..., None] for plane in values]
        return [plane.reshape(len(tile), -1) for plane in groups]

    parts = [parts[..., plane] for plane in range(planes)]
    if group < size:
        return tiles_cpu.tiled_product(parts, [codes, scale], floats)
    return tiles_cpu.tiled_product(parts, [codes], floats) * scale.T


def _as_bytes(codes: Int[Array, 'D F']) -> Int[Array, 'D F2']:
    """Codes of 4 bits, two a byte. The barrier keeps XLA from undoing it value by value where they are used."""
    pairs = codes.reshape(codes.shape[0], codes.shape[1] // 2, 2)
    return jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(pairs, jnp.int8))


def _planes(tile: Array, is_paired: bool) -> list[Float[Array, '...']]:
    """The codes as float32: all, or of bytes first those of even and then those of odd columns."""
    if not is_paired:
        return [tile.astype(jnp.float32)]
    low = jnp.right_shift(jnp.left_shift(tile, 4), 4)
    return [half.astype(jnp.float32) for half in (low, jnp.right_shift(tile, 4))]
