"""A matrix kept by its outputs, a `Representation` of `ops.linear`: what a CPU multiplies few activations with.

Lying so, one of integers or 16 bits is converted within the product of a single row, and one of float32 may stand left
in that of some rows: there XLA's CPU does not pack it, as it does on the right (`ops.tiles_cpu`).
"""

import math

import flax.struct
import jax
from jaxtyping import Array, Float, Int

from llama_jax.ops import linear
from llama_jax.partitioning import Partitioner


@flax.struct.dataclass
class OutputMajorArray:
    """A weight whose first axes a product sums over.

    Attributes:
      values: of the weight's shape, in the order of its transposition; of integers with scales each of both.
      num_summed: axes that are summed over.
    """

    values: linear.Weight
    num_summed: int = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, weight: linear.Weight, num_summed: int) -> 'OutputMajorArray':
        """Of a weight in its own order, or of integers with scales of as many axes."""
        return cls(jax.tree.map(lambda leaf: by_outputs(leaf, num_summed), weight), num_summed)

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return self.values.shape  # pyright: ignore[reportAttributeAccessIssue] - all that are in use have one

    def materialize(self) -> Float[Array, '...']:
        """The weight in its own order."""

        def in_own_order(leaf: Array) -> Array:
            return leaf.reshape(-1, self._size(leaf)).T.reshape(leaf.shape)

        return linear.materialize(jax.tree.map(in_own_order, self.values))

    def einsum(
        self, equation: str, x: Float[Array, '...'], output_dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, '...']:
        """As `ops.linear.einsum`."""
        of_x, rest = equation.split(',')
        of_weight, out = rest.split('->')
        summed, kept = of_weight[: self.num_summed], of_weight[self.num_summed :]
        assert of_x.endswith(summed) and out == of_x.removesuffix(summed) + kept, equation
        rows = x.reshape(-1, math.prod(self.shape[: self.num_summed]))
        matrix = jax.tree.map(lambda leaf: leaf.reshape(-1, self._size(leaf)), self.values)
        # Before a loop of steps: within a product the other shape would be found anew for each of its values.
        matrix = jax.lax.optimization_barrier(matrix)
        y = linear.by_outputs_product(rows, matrix, output_dtype)
        return y.reshape(*x.shape[: len(of_x) - self.num_summed], *self.shape[self.num_summed :])

    def take(
        self, rows: Int[Array, 'B T'], dtype: jax.typing.DTypeLike, partitioner: Partitioner | None
    ) -> Float[Array, 'B T D']:
        """As `ops.linear.take`."""
        return linear.take(self.materialize(), rows, dtype, partitioner)

    def _size(self, leaf: Array) -> int:
        return math.prod(leaf.shape[: self.num_summed])


def by_outputs(leaf: Array, num_summed: int) -> Array:
    """An array of the same shape in the order of its transposition."""
    return leaf.reshape(math.prod(leaf.shape[:num_summed]), -1).T.reshape(leaf.shape)
