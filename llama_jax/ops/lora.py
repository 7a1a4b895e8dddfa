"""A weight with a low-rank adapter beside it, a `Representation` of `ops.linear` (LoRA, arxiv.org/abs/2106.09685).

`weight = base + scale * a b`: of the base, which may be any representation and stays as it is, no gradient is asked;
what is trained are `a` and `b`. The product of the two is never made where activations are multiplied.
"""

import string

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from llama_jax.ops import linear
from llama_jax.partitioning import Partitioner

_RANK = 'R'  # the letter of the rank in equations, whose own are small ones


@flax.struct.dataclass
class LoraArray:
    """A weight and its adapter; every leaf has the layers' axis that the weight has.

    Attributes:
      base: the weight, whose first leaf has its shape.
      a: the weight's axes `axes`, then the rank.
      b: the rank, then the weight's other axes.
      key: what activations are dropped by on their way to the adapter; None: none is.
      scale: of the adapter.
      axes: of the weight, counted from its last: those that a product or look-up of it sums over.
      dropout: share of activations that the adapter does not see, the others being as much larger.
    """

    base: linear.Weight
    a: Float[Array, '...']
    b: Float[Array, '...']
    key: Key[Array, '*L'] | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=(-1,))
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.base.shape  # pyright: ignore[reportAttributeAccessIssue] - all that are in use have one

    def materialize(self) -> Float[Array, '...']:
        """The weight in float32, however the base is kept."""
        num_stacked = self.a.ndim - 1 - len(self.axes)
        ndim = num_stacked + len(self.axes) + self.b.ndim - 1 - num_stacked
        weight = string.ascii_lowercase[:ndim]
        stacked, (of_a, of_b) = weight[:num_stacked], self._letters(weight, num_stacked)
        added = jnp.einsum(f'{stacked}{of_a},{stacked}{of_b}->{weight}', self.a, self.b)
        return linear.materialize(self.base).astype(jnp.float32) + self.scale * added

    def einsum(
        self, equation: str, x: Float[Array, '...'], output_dtype: jax.typing.DTypeLike | None
    ) -> Float[Array, '...']:
        """As `ops.linear.einsum`; a table that is looked up along `axes` may be multiplied along its others."""
        operands, out = equation.split('->')
        of_x, of_weight = operands.split(',')
        of_a, of_b = self._letters(of_weight)
        first, second = (of_a, self.a), (of_b, self.b)
        if any(letter in out for letter in of_a):  # the embedding as a head: its rows are what is kept
            first, second = second, first
        others = ''.join(letter for letter in of_x if letter in out)
        y = linear.product(equation, x, self.base, output_dtype)
        z = linear.product(f'{of_x},{first[0]}->{others}{_RANK}', self._dropped(x), first[1])
        added = linear.product(f'{others}{_RANK},{second[0]}->{out}', self.scale * z, second[1], output_dtype)
        return y + added

    def take(
        self, rows: Int[Array, 'B T'], dtype: jax.typing.DTypeLike, partitioner: Partitioner | None
    ) -> Float[Array, 'B T D']:
        """As `ops.linear.take`; nothing is dropped of a look-up."""
        y = linear.take(self.base, rows, dtype, partitioner)
        z = linear.take(self.a, rows, dtype, partitioner)
        return y + linear.product('btr,rd->btd', self.scale * z, self.b)

    def _letters(self, of_weight: str, num_stacked: int = 0) -> tuple[str, str]:
        """Of a and b, where those of the weight are these."""
        summed = [of_weight[axis] for axis in self.axes]
        others = [letter for letter in of_weight[num_stacked:] if letter not in summed]
        return ''.join([*summed, _RANK]), ''.join([_RANK, *others])

    def _dropped(self, x: Float[Array, '...']) -> Float[Array, '...']:
        if self.key is None or not self.dropout:
            return x
        kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.dropout), 0)
