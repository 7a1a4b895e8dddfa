"""A model whose weights are in memory, read as those of an opened checkpoint are."""

import dataclasses

import numpy as np

from llama_jax.convert.mapping import Naming, Source, layers_of, weights_of


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """An array as a `Tensor`, whose `read` takes a slice an axis, and as a `LazyArray`, whose `read` takes a tuple."""

    values: np.ndarray

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    def read(self, *index):
        return self.values[index[0] if index and isinstance(index[0], tuple) else index]


def random_source(config, dtype=np.float32) -> Source:
    """Matrices that keep activations and logits at unit variance."""
    rng = np.random.default_rng(0)
    tensors = {}
    for weight in weights_of(config):
        shape = weight.matrix_shape(config)
        scale, shift = shape[-1] ** -0.5, 1.0 if len(shape) == 1 else 0.0
        tensors[weight.path] = [
            InMemory((shift + scale * rng.normal(size=shape)).astype(dtype))
            for _ in layers_of(weight, config)
        ]
    return Source(config, tensors, 'memory')


def matrices(source: Source, naming: Naming) -> dict[str, np.ndarray]:
    """All matrices by their foreign names; rows of q and k are half-split whichever names these are."""
    return {
        weight.name(naming, layer): source.tensors[weight.path][layer].read()
        for weight in weights_of(source.config)
        for layer in layers_of(weight, source.config)
    }
