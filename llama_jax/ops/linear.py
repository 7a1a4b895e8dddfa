"""All that is done with a weight: the product, the look-up of rows, the whole array.

A weight is an array, or a `Representation` of one: an adapter beside a frozen base, integers with scales. Nothing but
the functions here, and the representation's own methods that they call, looks inside it.
"""

import functools
from typing import Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

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
    if isinstance(weight, Representation):
        return weight.einsum(equation, x, output_dtype)
    # The name is what remat policies know the result by: they do not look inside a custom gradient.
    return checkpoint_name(_einsum(equation, x, weight, output_dtype), 'projection')


def take(
    table: Weight,
    rows: Int[Array, 'B T'],
    dtype: jax.typing.DTypeLike,
    partitioner: Partitioner | None = None,
) -> Float[Array, 'B T D']:
    """Rows of a weight [V, D] in another dtype: what the tokens are embedded as."""
    if isinstance(table, Representation):
        return table.take(rows, dtype, partitioner)
    table = table.astype(dtype)
    if partitioner is not None:
        # Looking up in a table split along `embed` makes XLA replicate the result first ("involuntary full
        # rematerialization"); with the table's rows whole it gathers from the shard that has them.
        table = partitioner.shard(table, ('vocab', 'act_embed'), 'embed')
    return jnp.take(table, rows, axis=0)


def materialize(weight: Weight) -> Float[Array, '...']:
    """The weight as one array, in its own dtype, with gradients into all that it is made of."""
    return weight.materialize() if isinstance(weight, Representation) else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(equation, x, weight, output_dtype):
    return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=output_dtype)


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
