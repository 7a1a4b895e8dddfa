"""The one product of activations with weights, so that a weight's representation is known in a single place."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def einsum(
    equation: str,
    x: Float[Array, '...'],
    weight: Float[Array, '...'],
    output_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, '...']:
    """Contracts `x` with `weight` in the dtype of `x`.

    The weight's gradient leaves the product in the weight's own dtype, fp32, without being rounded to that of the
    activations first: the gradients of a bf16 computation are summed in fp32, over microbatches and devices too.

    Args:
      equation: as for `jnp.einsum`, activations first, without '...'.
      x: activations; their dtype is the dtype of the computation.
      weight: master weight, cast to the dtype of `x`.
      output_dtype: of the accumulator and the result where it must not be rounded to that of `x` (the logits).
    """
    # The name is what remat policies know the result by: they do not look inside a custom gradient.
    return checkpoint_name(_einsum(equation, x, weight, output_dtype), 'projection')


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
