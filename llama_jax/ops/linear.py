"""All that is done with a weight: the product, the look-up of rows, the whole array.

A weight is an array, or a `Representation` of one: an adapter beside a frozen base, integers with scales. Nothing but
the functions here, and the representation's own methods that they call, looks inside it.
"""

import functools
import math
from typing import Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.ops import tiles_cpu
from llama_jax.partitioning import Partitioner


@runtime_checkable
class Representation(Protocol):
    """A weight that is kept as other than one array: a pytree whose first leaf has the weight's shape."""

    def einsum(
        self, equation: str, x: Float[Array, '...'], output_dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, '...']:
        """As the function of that name."""
        ...

    def take(
        self, rows: Int[Array, 'B T'], dtype: jax.typing.DTypeLike, partitioner: Partitioner | None
    ) -> Float[Array, 'B T D']:
        """As the function of that name."""
        ...

    def materialize(self) -> Float[Array, '...']:
        """As the function of that name."""
        ...


Weight: TypeAlias = Array | Representation

# Activations of up to so many tokens meet a weight of 16 bits tile by tile on a CPU: with more of them, the time of
# converting it is little.
_FEW_ROWS = 16
# Of the float32 that a CPU makes of a tile: it stays in the cache (2 MiB a core where this was found to be fastest),
# and is gone when the next is made.
_TILE_BYTES = 1 << 20


def einsum(
    equation: str,
    x: Float[Array, '...'],
    weight: Weight,
    output_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, '...']:
    """Contracts `x` with `weight` in the dtype of `x`.

    The weight's gradient leaves the product in the weight's own dtype, fp32, without being rounded to that of the
    activations first: the gradients of a bf16 computation are summed in fp32, over microbatches and devices too.

    Args:
      equation: as for `jnp.einsum`, activations first, without '...'.
      x: activations; their dtype is the dtype of the computation.
      weight: master weight, cast to the dtype of `x`, or a representation of it.
      output_dtype: of the accumulator and the result where it must not be rounded to that of `x` (the logits).
    """
    # The name is what remat policies know the result by: they do not look inside a custom gradient.
    return checkpoint_name(product(equation, x, weight, output_dtype), 'projection')


def product(
    equation: str,
    x: Float[Array, '...'],
    weight: Weight,
    output_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, '...']:
    """`einsum` with a part of a weight: remat policies know the sum of all parts, not each of them."""
    if isinstance(weight, Representation):
        return weight.einsum(equation, x, output_dtype)
    whole = functools.partial(_einsum, equation, output_dtype=output_dtype)
    if (
        _is_narrow(weight)
        and _sums_last_axes(equation)
        and math.prod(x.shape) <= _FEW_ROWS * math.prod(_summed_sizes(equation, weight))
    ):
        by_tiles = functools.partial(_einsum_by_tiles, equation, output_dtype=output_dtype)
        return jax.lax.platform_dependent(x, weight, cpu=by_tiles, default=whole)
    return whole(x, weight)


def by_outputs_product(
    x: Float[Array, 'B D'], matrix: Weight, output_dtype: jax.typing.DTypeLike | None
) -> Float[Array, 'B F']:
    """As `product`, of a matrix by its outputs on a CPU: of 16 bits it meets any number of rows tile by tile."""
    if not isinstance(matrix, Representation) and _is_narrow(matrix):
        return _einsum_by_tiles('bd,fd->bf', x, matrix, output_dtype)
    return product('bd,fd->bf', x, matrix, output_dtype)


def take(
    table: Weight,
    rows: Int[Array, 'B T'],
    dtype: jax.typing.DTypeLike,
    partitioner: Partitioner | None = None,
) -> Float[Array, 'B T D']:
    """Rows of a weight [V, D] in another dtype: what the tokens are embedded as."""
    if isinstance(table, Representation):
        return table.take(rows, dtype, partitioner)
    if partitioner is None and _is_narrow(table) and rows.size <= _FEW_ROWS:
        # XLA's CPU converts what it gathers from. It does so for the rows alone, unless it can for all steps at once.
        found = jnp.take(*jax.lax.optimization_barrier((table, rows)), axis=0)
        return found.astype(dtype)
    table = table.astype(dtype)
    if partitioner is not None:
        # Looking up in a table split along `embed` makes XLA replicate the result first ("involuntary full
        # rematerialization"); with the table's rows whole it gathers from the shard that has them.
        table = partitioner.shard(table, ('vocab', 'act_embed'), 'embed')
    return jnp.take(table, rows, axis=0)


def materialize(weight: Weight) -> Float[Array, '...']:
    """The weight as one array, in its own dtype, with gradients into all that it is made of."""
    return weight.materialize() if isinstance(weight, Representation) else weight


def _is_narrow(weight: Array) -> bool:
    """Whether it is of a floating-point type that a CPU does not multiply in; a master weight never is."""
    return jnp.issubdtype(weight.dtype, jnp.floating) and weight.dtype.itemsize == 2


def _sums_last_axes(equation: str) -> bool:
    """Whether it is of activations and a weight: not, say, of two activations, summed over tokens."""
    operands, out = equation.split('->')
    of_x, of_weight = operands.split(',')
    summed = ''.join(letter for letter in of_weight if letter not in out)
    kept = ''.join(letter for letter in of_weight if letter in out)
    return (
        of_x.endswith(summed)
        and out == of_x.removesuffix(summed) + kept
        and of_weight in (summed + kept, kept + summed)
    )


def _summed_sizes(equation: str, weight: Array) -> list[int]:
    operands, out = equation.split('->')
    return [
        size for letter, size in zip(operands.split(',')[1], weight.shape, strict=True) if letter not in out
    ]


def _einsum_by_tiles(
    equation: str, x: Float[Array, '...'], weight: Array, output_dtype: jax.typing.DTypeLike | None
) -> Float[Array, '...']:
    """The product on a CPU, which multiplies in float32 alone: otherwise it writes the whole weight in that first.

    The weight's first axes, or its last, are those summed over, and the activations' last.
    """
    operands, out = equation.split('->')
    of_x, of_weight = operands.split(',')
    num_kept = sum(letter in out for letter in of_x)
    kept = [size for letter, size in zip(of_weight, weight.shape, strict=True) if letter in out]
    size = math.prod(x.shape[num_kept:])
    rows = x.reshape(-1, size).astype(jnp.float32)

    is_summed_first = of_weight[0] not in out
    matrix = weight.reshape((size, -1) if is_summed_first else (-1, size))

    def step(y: Array, start: Array | int, length: int) -> Array:
        # Together with what changes from tile to tile: the whole weight would be converted once, before the loop.
        own, start = jax.lax.optimization_barrier((matrix, start))
        tile = jax.lax.dynamic_slice_in_dim(own, start, length).astype(jnp.float32)
        return y + jax.lax.dynamic_slice_in_dim(rows, start, length, axis=1) @ tile

    if not is_summed_first and len(rows) <= tiles_cpu.FEW_ROWS:
        y = tiles_cpu.few_rows_product(rows, [matrix], lambda matrix: matrix.astype(jnp.float32))
    elif not is_summed_first:
        y = tiles_cpu.tiled_product([rows], [matrix], lambda matrix: [matrix.astype(jnp.float32)])
    else:
        y = jnp.zeros((len(rows), math.prod(kept)), jnp.float32)
        y = tiles_cpu.over_tiles(len(matrix), 1, _TILE_BYTES // (4 * matrix.shape[1]), step, y)
    return y.reshape(*x.shape[:num_kept], *kept).astype(output_dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(equation, x, weight, output_dtype):
    def whole(x, weight):
        return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=output_dtype)

    def weight_first(x, weight):
        size = math.prod(_summed_sizes(equation, weight))
        y = tiles_cpu.weight_first_product(x.reshape(-1, size), weight.reshape(-1, size))
        return y.reshape(jax.eval_shape(whole, x, weight).shape).astype(output_dtype or x.dtype)

    if _is_weight_first(equation, x, weight):
        return jax.lax.platform_dependent(x, weight, cpu=weight_first, default=whole)
    return whole(x, weight)


def _is_weight_first(equation: str, x: Float[Array, '...'], weight: Array) -> bool:
    """Whether a CPU multiplies faster with the weight left: some rows, and float32 that lies by its outputs."""
    operands, out = equation.split('->')
    return (
        x.dtype == weight.dtype == jnp.float32
        and _sums_last_axes(equation)
        and operands[-1] not in out
        and tiles_cpu.is_weight_first(x.size // math.prod(_summed_sizes(equation, weight)))
    )


def _forward(equation, x, weight, output_dtype):
    return _einsum(equation, x, weight, output_dtype), (x, weight)


def _backward(equation, output_dtype, residuals, gradient):
    # Written out, as the products that automatic transposition makes of a stacked batch are slow on CPUs: XLA
    # materialises a transposed copy of the gradient, and computes what it depends on a second time for it.
    del output_dtype
    x, weight = residuals
    operands, out = equation.split('->')
    of_x, of_weight = operands.split(',')
    gradient = gradient.astype(x.dtype)
    if x.dtype != weight.dtype:
        # Each is made once. Otherwise XLA for TPU makes them anew within each product that they are factors of, and
        # holds for that all that they are made of: gate, up and their gradients rather than one array of the four.
        x, gradient = jax.lax.optimization_barrier(x), jax.lax.optimization_barrier(gradient)
    x_gradient = jnp.einsum(f'{out},{of_weight}->{of_x}', gradient, weight.astype(x.dtype))
    weight_gradient = jnp.einsum(
        f'{of_x},{out}->{of_weight}', x, gradient, preferred_element_type=weight.dtype
    )
    return x_gradient, weight_gradient


_einsum.defvjp(_forward, _backward)
