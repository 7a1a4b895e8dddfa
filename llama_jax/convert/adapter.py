"""Low-rank adapters of any format as the same matrices, and a model with one merged into it.

Of a weight's matrix [out, in], q and k half-split, an adapter has a [r, in] and b [out, r], and stands for
`scale * b @ a` added to it. That is PEFT's own form; of our params `a` and `b` are transposed and their heads apart.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.convert.mapping import LeafMatrix, Source, Weight, layers_of, weights_of
from llama_jax.convert.tensors import ALL, Computed, Tensor
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.types import LazyArray

Place = tuple[str, int]  # path of a weight in our params, and the layer


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What is added to one matrix.

    Attributes:
      a: [r, in].
      b: [out, r].
      scale: of their product.
      magnitude: [out], of DoRA (arxiv.org/abs/2402.09353): the length that each row of the sum gets; None: its own.
      name: of its tensors, for messages.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    name: str = ''


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What was trained beside a base.

    Attributes:
      low_rank: of some matrices.
      whole: matrices and vectors that stand in the place of the base's.
      rows: (ids, their rows [n, D]) that stand in the place of the embedding's, and of a tied head's; None: no such.
      ties: whether a tied head follows what else is trained of the embedding; else they are no longer tied.
      origin: the folder, for messages.
    """

    low_rank: Mapping[Place, LowRank]
    whole: Mapping[Place, Tensor]
    origin: str
    rows: tuple[tuple[int, ...], Tensor] | None = None
    ties: bool = False


def native_adapter(
    config: LlamaConfig, leaves: Mapping[str, LazyArray], adapters: Mapping[str, Any], origin: str
) -> Adapter:
    """Trained adapters by path of our params, as `llama_jax.lora` has them.

    Args:
      config: of the model.
      leaves: `PATH/a` and `PATH/b` of weights with an adapter, PATH of those that were trained whole.
      adapters: what model.json says of them: `scale`, and `layers` with adapters, where not all have one.
      origin: where they are from.

    Raises:
      InputError: a leaf is of no weight of the model.
    """
    scale, layers = adapters['scale'], adapters['layers']
    low_rank, whole, left = {}, {}, set(leaves)
    for weight in weights_of(config):
        names = {part: f'{weight.path}/{part}' for part in ('a', 'b')}
        for layer in layers_of(weight, config):
            if weight.path in leaves:
                whole[weight.path, layer] = LeafMatrix(leaves[weight.path], weight, layer, config)
            elif set(names.values()) <= set(leaves) and not (
                weight.stacked and layers and layer not in layers
            ):
                a, b = (_factor(leaves[name], weight, layer, part) for part, name in names.items())
                a, b = (b, a) if weight.path == 'embed' else (a, b)
                low_rank[weight.path, layer] = LowRank(a, b, scale, name=weight.path)
        left -= {weight.path, *names.values()}
    if left:
        raise InputError(f'{origin}: {min(left)} is no weight or adapter of this model')
    return Adapter(low_rank, whole, origin, ties=True)


def _factor(leaf: LazyArray, weight: Weight, layer: int, part: str) -> Computed:
    """A layer of `a` [in..., r] as [r, in], `b` [r, out...] as [out, r]; the embedding's [V, r], [r, D] as they are."""
    shape = tuple(leaf.shape[1:] if weight.stacked else leaf.shape)
    rank = shape[-1] if part == 'a' else shape[0]
    flat = (-1, rank) if part == 'a' else (rank, -1)

    def compute(rows: slice, columns: slice) -> np.ndarray:
        index = (*([slice(layer, layer + 1)] if weight.stacked else []), *[ALL] * len(shape))
        matrix = np.asarray(leaf.read(index)).reshape(flat)
        matrix = matrix if weight.path == 'embed' else matrix.T
        return np.ascontiguousarray(matrix[rows, columns], np.float32)

    size = int(np.prod(shape)) // rank
    is_turned = (part == 'a') == (weight.path != 'embed')
    return Computed((rank, size) if is_turned else (size, rank), np.dtype(leaf.dtype), compute)


def merged(base: Source, adapter: Adapter) -> Source:
    """The model that base and adapter are together, each block of it worked out in float32 as it is read.

    Raises:
      InputError: a tensor of the adapter has another shape than the base's; it is named, with both.
    """
    config, tensors = base.config, {path: list(layers) for path, layers in base.tensors.items()}
    if adapter.rows is not None:  # of a tied head as well
        tensors['embed'][0] = _with_rows(tensors['embed'][0], *adapter.rows)
    touched = {path for path, _ in (*adapter.low_rank, *adapter.whole)}
    if config.tie_embeddings and not adapter.ties and touched & {'embed', 'head'}:
        config = dataclasses.replace(config, tie_embeddings=False)
        tensors['head'] = list(tensors['embed'])
    tables = [path for path in ('embed', 'head') if path in tensors]
    if all((path, 0) in adapter.whole for path in tables):
        rows = {adapter.whole[path, 0].shape[0] for path in tables}
        if len(rows) == 1:  # a larger vocabulary
            config = dataclasses.replace(config, vocab_size=rows.pop())
    for (path, layer), tensor in adapter.whole.items():
        shape = _shape_of(path, config)
        if tuple(tensor.shape) != shape:
            raise InputError(
                f'{adapter.origin}: {path} of layer {layer} has shape {tuple(tensor.shape)}, in {base.origin} '
                f"{shape}; the adapter is another model's"
            )
        stored = _stored(tensors[path][layer])
        tensors[path][layer] = Computed(shape, stored, functools.partial(_read, tensor))
    for (path, layer), added in adapter.low_rank.items():
        tensor = tensors[path][layer]
        check_shapes(added, tuple(tensor.shape), adapter.origin, base.origin)
        tensors[path][layer] = Computed(
            tuple(tensor.shape), _stored(tensor), functools.partial(_sum, tensor, added)
        )
    return Source(config, tensors, f'{adapter.origin} on {base.origin}')


def check_shapes(added: LowRank, shape: tuple[int, ...], origin: str, base: str) -> None:
    """Raises InputError where an adapter is not of a matrix [out, in] of this shape."""
    rank = added.a.shape[0]
    wanted = {'a': (rank, shape[1]), 'b': (shape[0], rank), 'magnitude': (shape[0],)}
    for part, tensor in (('a', added.a), ('b', added.b), ('magnitude', added.magnitude)):
        if tensor is not None and tuple(tensor.shape) != wanted[part]:
            raise InputError(
                f'{origin}: {part} of {added.name} has shape {tuple(tensor.shape)}, for {list(shape)} in {base} it '
                f"must be {wanted[part]}; the adapter is another model's"
            )


def _shape_of(path: str, config: LlamaConfig) -> tuple[int, ...]:
    return next(w for w in weights_of(config) if w.path == path).matrix_shape(config)


def _stored(tensor: Tensor) -> np.dtype:
    return tensor.stored_dtype if isinstance(tensor, Computed) else tensor.dtype


def _read(tensor: Tensor, rows: slice, columns: slice) -> np.ndarray:
    index = (rows, columns)[: len(tensor.shape)]
    return tensor.read(*index)


def _wide(block: np.ndarray) -> np.ndarray:
    """In float32, or float64 as it was."""
    return block.astype(np.float64 if block.dtype == np.float64 else np.float32)


def _sum(tensor: Tensor, added: LowRank, rows: slice, columns: slice) -> np.ndarray:
    """The block [rows, columns] of what the sum of a matrix and its adapter is."""
    whole_rows = ALL if added.magnitude is not None else columns  # whose length counts
    b, a = _wide(added.b.read(rows)), _wide(added.a.read(ALL, whole_rows))
    with np.errstate(over='ignore', invalid='ignore'):  # what is not finite stays so, as in other formats
        block = _wide(tensor.read(rows, whole_rows)) + np.float32(added.scale) * (b @ a)
    if added.magnitude is None:
        return block
    length = np.sqrt(np.sum(block * block, axis=1, keepdims=True))
    with np.errstate(all='ignore'):  # a row of zeros has no direction, in PEFT neither
        return (block * (_wide(added.magnitude.read(rows))[:, None] / length))[:, columns]


def _with_rows(table: Tensor, ids: Sequence[int], values: Tensor) -> Computed:
    """A table with the rows of these ids replaced."""

    def compute(rows: slice, columns: slice) -> np.ndarray:
        start, stop, _ = rows.indices(table.shape[0])
        block = _wide(table.read(rows, columns))
        for place, row in enumerate(ids):
            if start <= row < stop:
                block[row - start] = values.read(slice(place, place + 1), columns)[0]
        return block

    return Computed(tuple(table.shape), _stored(table), compute)


def check_written_apart(adapter: Adapter, config: LlamaConfig, to: str) -> None:
    """Raises InputError where a format of adapters cannot say what was trained."""
    touched = {path for path, _ in (*adapter.low_rank, *adapter.whole)}
    if config.tie_embeddings and (side := touched & {'embed', 'head'}):
        raise InputError(
            f'{adapter.origin}: {min(side)} was trained, which is tied to its other side; {to} cannot say what '
            'becomes of that, write the merged model'
        )
    if adapter.rows is not None or any(added.magnitude is not None for added in adapter.low_rank.values()):
        what = 'rows of the embedding' if adapter.rows is not None else 'DoRA'
        raise InputError(f'{adapter.origin} has {what}, which is not written as {to}; write the merged model')
    if not adapter.low_rank:
        raise InputError(f'{adapter.origin} has no low-rank adapter; write the merged model')
