"""A matrix kept by its outputs, a `Representation` of `ops.linear`: what a CPU multiplies few activations with.

XLA's CPU reads a single row's product with a matrix at the memory's speed in either order. Of 2 to 32 rows it packs the
matrix for each product, which takes 1.6 times as long where what is summed over does not lie side by side.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.ops import linear
from llama_jax.partitioning import Partitioner


@flax.struct.dataclass
class OutputMajorArray:
    """A weight whose first axes a product sums over.

    Attributes:
      values: of the weight's shape, in the order of its transposition.
      num_summed: axes that are summed over.
    """

    values: Float[Array, '...']
    num_summed: int = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, weight: Float[Array, '...'], num_summed: int) -> 'OutputMajorArray':
        """Of a weight in its own order."""
        size = math.prod(weight.shape[:num_summed])
        return cls(weight.reshape(size, -1).T.reshape(weight.shape), num_summed)

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the values."""
        return self.values.dtype

    def materialize(self) -> Float[Array, '...']:
        """The weight in its own order."""
        size = math.prod(self.shape[: self.num_summed])
        return self.values.reshape(-1, size).T.reshape(self.shape)

    def einsum(
        self, equation: str, x: Float[Array, '...'], output_dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, '...']:
        """As `ops.linear.einsum`."""
        of_x, rest = equation.split(',')
        of_weight, out = rest.split('->')
        summed, kept = of_weight[: self.num_summed], of_weight[self.num_summed :]
        assert of_x.endswith(summed) and out == of_x.removesuffix(summed) + kept, equation
        size = math.prod(self.shape[: self.num_summed])
        rows = x.reshape(-1, size)
        y = linear.einsum('bd,fd->bf', rows, self.values.reshape(-1, size), output_dtype)
        return y.reshape(*x.shape[: len(of_x) - self.num_summed], *self.shape[self.num_summed :])

    def take(
        self, rows: Int[Array, 'B T'], dtype: jax.typing.DTypeLike, partitioner: Partitioner | None
    ) -> Float[Array, 'B T D']:
        """As `ops.linear.take`."""
        return linear.take(self.materialize(), rows, dtype, partitioner)
