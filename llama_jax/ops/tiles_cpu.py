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


def over_tiles(size: int, unit: int, wanted: int, step: Callable, start: Any) -> Any:
    """`step(result, first, length)` for tiles of about `wanted` rows, whole units each, that cover `size` rows."""
    length = min(max(wanted // unit, 1) * unit, size)
    number, rest = divmod(size, length)
    result = jax.lax.fori_loop(0, number, lambda i, result: step(result, i * length, length), start)
    return step(result, number * length, rest) if rest else result
