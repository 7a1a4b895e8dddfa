"""The mean of several models' weights, as Llama 3 averages checkpoints (Dubey et al. 2024, section 4)."""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from llama_jax.convert.mapping import Source, layers_of, weights_of
from llama_jax.convert.tensors import Computed, Tensor
from llama_jax.errors import InputError


def mean_of(sources: Sequence[Source]) -> Source:
    """Models of one architecture as the one whose every weight is the mean of theirs, worked out as it is read.

    Sums are float64; what is read is float32, so that it is rounded once more where another type is written.

    Raises:
      InputError: the architectures differ; the first field in which they do is named.
    """
    first = sources[0]
    for other in sources[1:]:
        for field in dataclasses.fields(first.config):
            values = [getattr(source.config, field.name) for source in (first, other)]
            if values[0] != values[1]:
                raise InputError(
                    f'{other.origin} has {field.name} {values[1]}, {first.origin} {values[0]}; there is a mean only of '
                    'models of one architecture'
                )
    tensors = {
        weight.path: [
            _mean_tensor([source.tensors[weight.path][layer] for source in sources])
            for layer in layers_of(weight, first.config)
        ]
        for weight in weights_of(first.config)
    }
    return Source(first.config, tensors, ', '.join(source.origin for source in sources))


def _mean_tensor(parts: Sequence[Tensor]) -> Computed:
    dtype = np.dtype(functools.reduce(jnp.promote_types, [part.dtype for part in parts]))

    def compute(rows: slice, columns: slice) -> np.ndarray:
        total = np.zeros((), np.float64)
        for part in parts:
            index = (rows, columns)[: len(part.shape)]
            total = total + part.read(*index).astype(np.float64)
        return total / len(parts)

    return Computed(tuple(parts[0].shape), dtype, compute)
