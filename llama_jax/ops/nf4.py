"""Weights of 4 bits whose levels are spread as a normal distribution's, a `Representation` of `ops.linear`: nf4.

`weight = level[code] * absmax`, absmax the largest of each block of 64 weights along what a product sums over: levels,
blocks and codes are those of QLoRA (arxiv.org/abs/2305.14314) as bitsandbytes has them. Double quantisation keeps
absmax itself in 8 bits: `absmax = code * nested + offset`, nested by output channel and offset by layer.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from llama_jax.ops import linear
from llama_jax.ops.quantized import frozen_product, spread
from llama_jax.partitioning import Partitioner

BLOCK = 64  # weights that share an absmax, where so many divide what is summed over
# fmt: off
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
# fmt: on
_BOUNDS = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
_ABSMAX_CODES = 127


@flax.struct.dataclass
class Nf4Array:
    """A weight as codes of 4 bits.

    Attributes:
      codes: uint4, of the weight's shape.
      absmax: of as many axes: along each, one value for every `shape / absmax.shape` consecutive weights; float32, or
        int8 where it is quantised itself.
      nested: of int8 absmax: what a step of it is; of as many axes.
      offset: of int8 absmax: what 0 of it is; of as many axes.
    """

    codes: UInt[Array, '...']
    absmax: Array
    nested: Float[Array, '...'] | None = None
    offset: Float[Array, '...'] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.codes.shape

    def materialize(self) -> Float[Array, '...']:
        """The weight in float32."""
        return _dequantized(self.codes, self.absmax, self.nested, self.offset)

    def einsum(
        self, equation: str, x: Float[Array, '...'], output_dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, '...']:
        """As `ops.linear.einsum`."""

        def product(x, *parts):
            weight = _dequantized(*parts).astype(x.dtype)
            return jnp.einsum(equation, x, weight, preferred_element_type=output_dtype)

        parts = (self.codes, self.absmax, self.nested, self.offset)
        return frozen_product(equation, product, _dequantized, x, parts)

    def take(
        self, rows: Int[Array, 'B T'], dtype: jax.typing.DTypeLike, partitioner: Partitioner | None
    ) -> Float[Array, 'B T D']:
        """As `ops.linear.take`."""
        return linear.take(self.materialize(), rows, dtype, partitioner)


def quantize_nf4(
    weight: Float[Array, '...'], counts: Sequence[int], *, double: bool = True, num_stacked: int = 0
) -> Nf4Array:
    """The weight in codes.

    Args:
      weight: layers stacked on its first axes, if there are any.
      counts: blocks along each axis, as `quantized.scale_shape` tells them.
      double: quantise absmax too.
      num_stacked: of the first axes.
    """
    weight = weight.astype(jnp.float32)
    absmax = absmax_of(weight, counts)
    codes = codes_of(weight, spread(absmax, weight.shape)).astype(jnp.uint4)
    return Nf4Array(codes, *(quantize_absmax(absmax, weight.shape, num_stacked) if double else (absmax,)))


def absmax_of(weight: Any, counts: Sequence[int]) -> Any:
    """The largest of each block of float32 weights in NumPy or JAX, so many blocks along each axis."""
    split = [size for n, count in zip(weight.shape, counts, strict=True) for size in (count, n // count)]
    return abs(weight.reshape(split)).max(axis=tuple(range(1, 2 * weight.ndim, 2)))


def codes_of(weight: Any, absmax: Any) -> Any:
    """uint8 codes of float32 weights in NumPy or JAX: of the nearest levels, of two as near the lower one's.

    Args:
      weight: float32.
      absmax: of its blocks, spread to the weight's shape.
    """
    xp = weight.__array_namespace__()
    scaled = xp.clip(weight * (np.float32(1) / xp.maximum(absmax, np.finfo(np.float32).tiny)), -1, 1)
    if isinstance(weight, np.ndarray):
        return np.searchsorted(_BOUNDS, scaled).astype(np.uint8)
    return sum((scaled > bound).astype(jnp.uint8) for bound in _BOUNDS)


def quantize_absmax(absmax: Any, shape: Sequence[int], num_stacked: int) -> tuple[Any, Any, Any]:
    """(int8 codes, nested, offset) of absmax in NumPy or JAX.

    Args:
      absmax: float32, of blocks of a weight.
      shape: of the weight; it has fewer blocks along those axes that a product sums over.
      num_stacked: first axes that are of layers.
    """
    xp = absmax.__array_namespace__()
    axes = tuple(range(num_stacked, absmax.ndim))
    summed = tuple(axis for axis in axes if absmax.shape[axis] < shape[axis])
    offset = absmax.mean(axis=axes, keepdims=True)
    nested = abs(absmax - offset).max(axis=summed, keepdims=True) / np.float32(_ABSMAX_CODES)
    nested = xp.where(nested == 0, np.float32(1), nested)
    return ((absmax - offset) / nested).round().astype(np.int8), nested, offset


def dequantize_absmax(absmax: Any, nested: Any, offset: Any) -> Any:
    """float32 absmax, of whichever form, in NumPy or JAX."""
    return absmax if nested is None else absmax.astype(np.float32) * nested + offset


def _dequantized(
    codes: Array, absmax: Array, nested: Array | None, offset: Array | None
) -> Float[Array, '...']:
    if nested is not None and offset is not None:
        nested, offset = (jnp.broadcast_to(x, absmax.shape) for x in (nested, offset))
    absmax = dequantize_absmax(absmax, nested, offset)
    values = jax.lax.platform_dependent(codes, cpu=_levels_of_bytes, default=_levels)
    return values * spread(absmax, codes.shape)


def _levels_of_bytes(codes: UInt[Array, '... F']) -> Float[Array, '... F']:
    """On a CPU, which would convert what is of 4 bits one by one: two of a byte by shifts."""
    if codes.shape[-1] % 2:
        return _levels(codes)
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    pairs = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(pairs, jnp.uint8))
    return jnp.stack([_levels(pairs & 15), _levels(pairs >> 4)], -1).reshape(codes.shape)


def _levels(codes: UInt[Array, '...']) -> Float[Array, '...']:
    """A tree of choices by the bits of a code: a look-up in a table is slow on every device."""
    codes = codes.astype(jnp.uint8)
    bits = [(codes & (1 << bit)) != 0 for bit in range(4)]

    def choose(levels: np.ndarray, bit: int) -> Any:
        if bit < 0:
            return levels[0]
        half = len(levels) // 2
        return jnp.where(bits[bit], choose(levels[half:], bit - 1), choose(levels[:half], bit - 1))

    return choose(LEVELS, 3)
