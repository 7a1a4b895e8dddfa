"""The one product of activations with weights, so that a weight's representation is known in a single place."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def einsum(
    equation: str,
    x: Float[Array, '...'],
    weight: Float[Array, '...'],
    *,
    output_dtype: jnp.dtype | None = None,
) -> Float[Array, '...']:
    """Contracts `x` with `weight` in the dtype of `x`.

    Args:
      equation: as for `jnp.einsum`, activations first.
      x: activations; their dtype is the dtype of the computation.
      weight: master weight, cast to the dtype of `x`.
      output_dtype: of the accumulator and the result where it must not be rounded to that of `x` (the logits).
    """
    return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=output_dtype)
