"""Leaves of our params as other formats' codes and scales, out of their matrices."""

import dataclasses

from llama_jax.convert.mapping import Leaf, Source, Weight, leaf_shape
from llama_jax.convert.tensors import Tensor
from llama_jax.ops.quantized import scale_shape


def counts_of(weight: Weight, source: Source, group: int) -> tuple[int, ...] | None:
    """The shape of a weight's scales, of groups along a matrix's rows; None where these are no whole groups of ours."""
    shape = leaf_shape(weight, source.config)
    summed = range(weight.stacked, weight.stacked + weight.num_in) if weight.num_in else [len(shape) - 1]
    return scale_shape(shape, list(summed), group)


def part_leaf(
    weight: Weight, source: Source, parts: list[Tensor], counts: tuple[int, ...] | None = None
) -> 'PartLeaf':
    """Codes, or scales of the shape `counts`, in the layout of our params.

    Args:
      weight: of which they are.
      source: the checkpoint.
      parts: the matrices of its layers.
      counts: None for codes, which are of the weight's shape.
    """
    return PartLeaf(Source(source.config, {weight.path: parts}, source.origin), weight, counts=counts)


@dataclasses.dataclass(frozen=True)
class PartLeaf(Leaf):
    """A leaf of codes, or of scales, which are fewer."""

    counts: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part, where it is not the weight's."""
        return self.counts or super().shape
