"""Products on a CPU with weights of narrower types than float32, in which alone XLA's CPU multiplies.

Of several rows with such a weight it would write all of that in float32 first. In the product of a single row with a
matrix by its outputs it converts what it reads within the product, as fast as the memory gives it: so do few rows one
after the other. More of them meet a tile of the weight at a time, whose float32 stays in the cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Up to so many rows one after the other take less time than all of them with a tile's float32.
FEW_ROWS = 8
# More than one row and up to so many take less time right of the weight than left.
_WEIGHT_FIRST_ROWS = 64
# Of the float32 that is made of a tile. A product much smaller than one of so many bytes is left to a single core.
_TILE_BYTES = 2 << 20
# A weight of fewer bytes stays in the cache that all cores share, from one row to the next. Of a larger one all rows
# meet a piece of so many bytes before the next, which stays in that of a core.
_SHARED_BYTES, _PIECE_BYTES = 8 << 20, 512 << 10


def few_rows_product(
    x: Float[Array, 'B D'],
    parts: Sequence[Array],
    floats: Callable[..., Float[Array, 'f D']],
    scale: Float[Array, 'F 1'] | None = None,
) -> Float[Array, 'B F']:
    """`x @ floats(*parts).T` in float32, row by row.

    Args:
      x: `FEW_ROWS` at most.
      parts: what the weight is made of, each with its outputs first.
      floats: the weight, or that of some outputs, of the parts.
      scale: of the outputs.
    """

    def each(parts: Sequence[Array], scale: Array | None) -> Float[Array, 'B f']:
        found = []
        for index in range(len(x)):
            # Together with what changes from step to step: the weight would be converted once, before a loop of steps.
            row, own = jax.lax.optimization_barrier((x[index : index + 1], tuple(parts)))
            found.append(row @ floats(*own).T)
        return jnp.concatenate(found) if scale is None else jnp.concatenate(found) * scale.T

    # What the rows are made of XLA would compute anew for each output, within the product, but for what a branch gives.
    x = x.astype(jnp.float32)
    # Either branch gives the same; of two that are written alike XLA would make none.
    x = jax.lax.cond(jnp.isnan(x[0, 0]), lambda x: jnp.where(jnp.isnan(x), jnp.nan, x), lambda x: x, x)
    num_bytes, num_out = sum(part.size * part.dtype.itemsize for part in parts), len(parts[0])
    if len(x) == 1 or num_bytes <= _SHARED_BYTES:
        return each(parts, scale)

    def put_piece(y: Array, start: Array | int, length: int) -> Array:
        own, start = jax.lax.optimization_barrier(((tuple(parts), scale), start))
        made = each(*jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, start, length), own))
        return jax.lax.dynamic_update_slice_in_dim(y, made, start, 1)

    wanted = _PIECE_BYTES * num_out // num_bytes
    return over_tiles(num_out, 1, wanted, put_piece, jnp.zeros((len(x), num_out), jnp.float32))


def is_weight_first(num_rows: int) -> bool:
    """Whether so many rows are multiplied faster as `weight_first_product`."""
    return 1 < num_rows <= _WEIGHT_FIRST_ROWS


def weight_first_product(x: Float[Array, 'B D'], matrix: Float[Array, 'F D']) -> Float[Array, 'B F']:
    """`x @ matrix.T` with the matrix left: the barrier keeps XLA from turning it round."""
    return jax.lax.optimization_barrier(matrix @ x.T).T


def tiled_product(
    x: Sequence[Float[Array, 'B d']],
    parts: Sequence[Array],
    floats: Callable[..., Sequence[Float[Array, 'f d']]],
) -> Float[Array, 'B F']:
    """`x @ floats(*parts).T` in float32, of which no more than a tile is there at once.

    Args:
      x: activations, in as many parts along what is summed as `floats` gives of the weight.
      parts: what the weight is made of, each with its outputs first.
      floats: the weight, or that of some outputs, of the parts.
    """
    num_rows, num_out, size = len(x[0]), len(parts[0]), sum(part.shape[1] for part in x)
    first = is_weight_first(num_rows)
    right = [part.T if first else part for part in x]

    def put_tile(y: Array, start: Array | int, length: int) -> Array:
        # Together with what changes from tile to tile: the whole weight would be converted once, before the loop; and
        # with the activations: of a single tile it would be, before a loop of steps.
        own, start, others = jax.lax.optimization_barrier((tuple(parts), start, right))
        tiles = floats(*(jax.lax.dynamic_slice_in_dim(part, start, length) for part in own))
        made = sum(
            tile @ other if first else other @ tile.T for tile, other in zip(tiles, others, strict=True)
        )
        return jax.lax.dynamic_update_slice_in_dim(y, made, start, 0 if first else 1)

    # At least two, and alike as far as may be: outside a loop each would have memory of its own, fresh in every call.
    least = max(-(-4 * size * num_out // _TILE_BYTES), 2)
    number = next((number for number in range(least, 2 * least) if num_out % number == 0), least)
    zeros = jnp.zeros((num_out, num_rows) if first else (num_rows, num_out), jnp.float32)
    y = over_tiles(num_out, 1, num_out // number, put_tile, zeros)
    return jax.lax.optimization_barrier(y).T if first else y


def over_tiles(size: int, unit: int, wanted: int, step: Callable, start: Any) -> Any:
    """`step(result, first, length)` for tiles of about `wanted` rows, whole units each, that cover `size` rows."""
    length = min(max(wanted // unit, 1) * unit, size)
    number, rest = divmod(size, length)
    result = jax.lax.fori_loop(0, number, lambda i, result: step(result, i * length, length), start)
    return step(result, number * length, rest) if rest else result
