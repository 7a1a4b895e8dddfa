"""The one table of weights: ours, Meta's, Hugging Face's and GGUF's name of each, and how its values are laid out.

Every format is read into, and written from, the same matrices: [out, in] as torch stores a linear layer, with the rows
of q and k half-split. Those are Hugging Face's own; Meta, GGUF and llama2.c interleave q and k (`rotary`); ours are the
transposes, with heads on an axis of their own and all layers stacked.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from llama_jax.convert.tensors import ALL, Computed, HalfSplit, Rounded, Tensor, row_blocks
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.placement import cast, copy_tiles
from llama_jax.types import LazyArray

Naming = Literal['meta', 'huggingface', 'gguf']


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of the table.

    Attributes:
      path: of the leaf in our params; leaves under `blocks` are stacked, one matrix a layer.
      meta: name in Meta's state dict, {} for the layer.
      huggingface: name in safetensors.
      gguf: name in GGUF.
      shape: of the matrix [out, in], in words of `_sizes`.
      num_in: how many leading axes of our leaf (one layer of it) the matrix's `in` becomes; 0: it is not transposed.
      meta_axis: along which Meta's model-parallel ranks split it; None: every rank holds all of it. The embedding's
        is that of Llama 3; LLaMA 1 and 2 split it along axis 1.
      rotary: rows are q's or k's, which Meta and GGUF interleave.
    """

    path: str
    meta: str
    huggingface: str
    gguf: str
    shape: tuple[str, ...]
    num_in: int = 0
    meta_axis: int | None = None
    rotary: bool = False

    @property
    def stacked(self) -> bool:
        """Whether every layer has one."""
        return self.path.startswith('blocks/')

    def name(self, naming: Naming, layer: int) -> str:
        """Its foreign name, in one layer."""
        return getattr(self, naming).format(layer)

    def matrix_shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """Of one layer, [out, in] or [size]."""
        sizes = _sizes(config)
        return tuple(sizes[axis] for axis in self.shape)


def _sizes(config: LlamaConfig) -> dict[str, int]:
    return {
        'vocab': config.vocab_size,
        'embed': config.embed_dim,
        'mlp': config.mlp_dim,
        'heads': config.num_heads * config.head_dim,
        'kv_heads': config.num_kv_heads * config.head_dim,
    }


# fmt: off
WEIGHTS: tuple[Weight, ...] = (
    Weight('embed', 'tok_embeddings.weight', 'model.embed_tokens.weight', 'token_embd.weight',
           ('vocab', 'embed'), meta_axis=0),
    Weight('blocks/attention_norm', 'layers.{}.attention_norm.weight', 'model.layers.{}.input_layernorm.weight',
           'blk.{}.attn_norm.weight', ('embed',)),
    Weight('blocks/attention/q', 'layers.{}.attention.wq.weight', 'model.layers.{}.self_attn.q_proj.weight',
           'blk.{}.attn_q.weight', ('heads', 'embed'), num_in=1, meta_axis=0, rotary=True),
    Weight('blocks/attention/k', 'layers.{}.attention.wk.weight', 'model.layers.{}.self_attn.k_proj.weight',
           'blk.{}.attn_k.weight', ('kv_heads', 'embed'), num_in=1, meta_axis=0, rotary=True),
    Weight('blocks/attention/v', 'layers.{}.attention.wv.weight', 'model.layers.{}.self_attn.v_proj.weight',
           'blk.{}.attn_v.weight', ('kv_heads', 'embed'), num_in=1, meta_axis=0),
    Weight('blocks/attention/o', 'layers.{}.attention.wo.weight', 'model.layers.{}.self_attn.o_proj.weight',
           'blk.{}.attn_output.weight', ('embed', 'heads'), num_in=2, meta_axis=1),
    Weight('blocks/mlp_norm', 'layers.{}.ffn_norm.weight', 'model.layers.{}.post_attention_layernorm.weight',
           'blk.{}.ffn_norm.weight', ('embed',)),
    Weight('blocks/mlp/gate', 'layers.{}.feed_forward.w1.weight', 'model.layers.{}.mlp.gate_proj.weight',
           'blk.{}.ffn_gate.weight', ('mlp', 'embed'), num_in=1, meta_axis=0),
    Weight('blocks/mlp/up', 'layers.{}.feed_forward.w3.weight', 'model.layers.{}.mlp.up_proj.weight',
           'blk.{}.ffn_up.weight', ('mlp', 'embed'), num_in=1, meta_axis=0),
    Weight('blocks/mlp/down', 'layers.{}.feed_forward.w2.weight', 'model.layers.{}.mlp.down_proj.weight',
           'blk.{}.ffn_down.weight', ('embed', 'mlp'), num_in=1, meta_axis=1),
    Weight('final_norm', 'norm.weight', 'model.norm.weight', 'output_norm.weight', ('embed',)),
    Weight('head', 'output.weight', 'lm_head.weight', 'output.weight', ('vocab', 'embed'), meta_axis=0),
    # Of a reward model, in the head's place; a name in Hugging Face alone, where it is one row.
    Weight('score', '', 'score.weight', '', ('embed',)),
)
# fmt: on


def weights_of(config: LlamaConfig) -> tuple[Weight, ...]:
    """The rows that a model of this config has: no head where it is tied to the embedding, or is a score."""
    left_out = {'head'} if config.scalar_head else {'head', 'score'} if config.tie_embeddings else {'score'}
    return tuple(w for w in WEIGHTS if w.path not in left_out)


def layers_of(weight: Weight, config: LlamaConfig) -> range:
    """The layers of a stacked weight; one turn for the others."""
    return range(config.num_layers if weight.stacked else 1)


def in_file_order(config: LlamaConfig) -> list[tuple[Weight, int]]:
    """Every matrix and its layer in the order of all formats: embedding, layer by layer, final norm, head."""
    rows = [(weight, layer) for weight in weights_of(config) for layer in layers_of(weight, config)]
    place = {
        'embed': -1,
        'final_norm': config.num_layers,
        'head': config.num_layers + 1,
        'score': config.num_layers + 1,
    }
    # Stable: within a layer as in the table.
    return sorted(rows, key=lambda row: place.get(row[0].path, row[1]))


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint of any format: each weight as matrices [out, in], q and k half-split, to read in pieces.

    Attributes:
      config: the architecture.
      tensors: by path of the params; one matrix a layer.
      origin: the folder or file, for messages.
    """

    config: LlamaConfig
    tensors: Mapping[str, Sequence[Tensor]]
    origin: str

    @property
    def dtype(self) -> np.dtype:
        """Of the embedding, and usually of all."""
        return self.tensors['embed'][0].dtype


def rounded(source: Source) -> Source:
    """The same weights, those that are worked out cast once to the type of what they are made of."""
    tensors = {
        path: [Rounded(tensor, path) if isinstance(tensor, Computed) else tensor for tensor in layers]
        for path, layers in source.tensors.items()
    }
    return dataclasses.replace(source, tensors=tensors)


def assemble(
    found: Mapping[str, Tensor],
    naming: Naming,
    config: LlamaConfig,
    *,
    origin: str,
    ignored: Sequence[str] = (),
) -> Source:
    """Finds every weight of the model under its foreign name, and a use for every tensor found.

    Args:
      found: tensors by foreign name.
      naming: whose names these are; but for Hugging Face's, q and k are taken to be interleaved.
      config: the architecture that the shapes must agree with.
      origin: the folder or file, for messages.
      ignored: patterns of whole names without a place in the model, such as buffers of RoPE frequencies.

    Raises:
      InputError: a tensor is missing, of another shape, or left over; it is named.
    """
    left = {name for name in found if not any(re.fullmatch(pattern, name) for pattern in ignored)}
    tensors: dict[str, list[Tensor]] = {}
    for weight in weights_of(config):
        shape = weight.matrix_shape(config)
        for layer in layers_of(weight, config):
            name = weight.name(naming, layer)
            if name not in found:
                raise InputError(
                    f'{origin} has no tensor {name}; a model of {config.num_layers} layers needs it'
                )
            tensor = found[name]
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f'{origin}: tensor {name} has shape {tuple(tensor.shape)}, the model {shape}; '
                    'its configuration file does not belong to these weights'
                )
            if weight.rotary and naming != 'huggingface':
                tensor = HalfSplit(tensor, config.head_dim)
            tensors.setdefault(weight.path, []).append(tensor)
            left.discard(name)
    if left:
        raise InputError(
            f'{origin} holds {len(left)} tensors without a place in a Llama of {config.num_layers} layers, '
            f'the first one {min(left)}; it is another architecture, or its configuration file does not belong to it'
        )
    return Source(config, tensors, origin)


# Between a matrix [out, in] and one layer of our leaf stands a transpose, with its axes split into ours.


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of our params, out of a source's matrices.

    Attributes:
      source: an opened checkpoint.
      weight: which leaf.
      cast_to: the type of its blocks; None for the source's own.
    """

    source: Source
    weight: Weight
    cast_to: np.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight in the tree of params."""
        return leaf_shape(self.weight, self.source.config)

    @property
    def dtype(self) -> np.dtype:
        """Of all layers, which are one array: the narrowest that holds what each of them does."""
        if self.cast_to:
            return self.cast_to
        dtypes = [tensor.dtype for tensor in self.source.tensors[self.weight.path]]
        return np.dtype(functools.reduce(jnp.promote_types, dtypes))

    @property
    def rows_axis(self) -> int:
        """The axis of the matrices' rows, or of their heads."""
        return self.weight.num_in + self.weight.stacked

    def blocks(self) -> Iterator[tuple[slice, ...]]:
        """Rows of one matrix after another, as they lie in the files; rows of whole heads, where there are any."""
        cut, tensors = self.weight.num_in, self.source.tensors[self.weight.path]
        for layer, tensor in enumerate(tensors):
            stacked = (slice(layer, layer + 1),) if self.weight.stacked else ()
            shape = self.shape[len(stacked) :]
            inner = math.prod(shape[cut + 1 :]) if cut else 1
            for rows in row_blocks(tuple(tensor.shape), tensor.dtype, multiple=inner):
                outer = slice(rows.start // inner, rows.stop // inner)
                yield (*stacked, *[ALL] * cut, outer, *[ALL] * (len(shape) - cut - 1))

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The block of these slices, the stacked layers first; only the rows and columns it needs are read.

        That of one layer may be a transposed view.
        """
        spans = [slice(*s.indices(size)[:2]) for s, size in zip(index, self.shape, strict=True)]
        tensors = self.source.tensors[self.weight.path]
        if not self.weight.stacked:
            return cast(tensors[0].read(*spans), self.dtype, self.weight.path)
        layers = tensors[spans[0]]
        if len(layers) == 1:
            return cast(self._read_layer(layers[0], spans[1:]), self.dtype, self.weight.path)[None]
        block = np.empty([max(span.stop - span.start, 0) for span in spans], self.dtype)
        for slot, tensor in zip(block, layers, strict=True):
            copy_tiles(slot, cast(self._read_layer(tensor, spans[1:]), self.dtype, self.weight.path))
        return block

    def _read_layer(self, tensor: Tensor, spans: list[slice]) -> np.ndarray:
        cut = self.weight.num_in
        if not cut:
            return tensor.read(*spans)
        shape = self.shape[1:]
        columns, rows = _cover(spans[:cut], shape[:cut]), _cover(spans[cut:], shape[cut:])
        widths = [max(span.stop - span.start, 0) for span in (spans[0], spans[cut])]
        block = tensor.read(rows, columns)
        block = block.reshape(widths[1], *shape[cut + 1 :], widths[0], *shape[1:cut])
        outs = block.ndim - cut
        block = block.transpose(*range(outs, block.ndim), *range(outs))
        return block[(ALL, *spans[1:cut], ALL, *spans[cut + 1 :])]


@dataclasses.dataclass(frozen=True)
class LeafMatrix:
    """One layer of a leaf of our params as the matrix [out, in]."""

    leaf: LazyArray
    weight: Weight
    layer: int
    config: LlamaConfig

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return self.weight.matrix_shape(self.config)

    @property
    def dtype(self) -> np.dtype:
        """Of the leaf."""
        return self.leaf.dtype

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`."""
        layer = (slice(self.layer, self.layer + 1),) if self.weight.stacked else ()
        cut = self.weight.num_in
        if not cut:
            index = (*layer, *(rows, columns)[: len(self.shape)])
            block = self.leaf.read(index)
            return block[0] if layer else block
        shape = self.leaf.shape[1:]
        ins, columns = _whole(columns, shape[:cut])
        outs, rows = _whole(rows, shape[cut:])
        block = self.leaf.read((*layer, *ins, *outs))[0]
        matrix = block.reshape(math.prod(block.shape[:cut]), math.prod(block.shape[cut:]))
        return transpose(matrix[columns, rows])


def native_source(config: LlamaConfig, leaves: Mapping[str, LazyArray], origin: str) -> Source:
    """Our own params as a source, to be written in another format.

    Raises:
      InputError: a leaf is missing, of another shape, or left over.
    """
    weights = weights_of(config)
    tensors: dict[str, list[Tensor]] = {}
    for weight in weights:
        shape = leaf_shape(weight, config)
        if weight.path not in leaves:
            raise InputError(f'{origin} has no weight {weight.path}')
        leaf = leaves[weight.path]
        if tuple(leaf.shape) != shape:
            raise InputError(
                f'{origin}: weight {weight.path} has shape {tuple(leaf.shape)}, the model {shape}'
            )
        tensors[weight.path] = [LeafMatrix(leaf, weight, i, config) for i in layers_of(weight, config)]
    if left := set(leaves) - {weight.path for weight in weights}:
        raise InputError(f'{origin} holds {min(left)}, which this model has not')
    return Source(config, tensors, origin)


def leaf_shape(weight: Weight, config: LlamaConfig) -> tuple[int, ...]:
    """Of our leaf, the stacked layers first."""
    sizes = _sizes(config)
    heads = {
        'heads': (config.num_heads, config.head_dim),
        'kv_heads': (config.num_kv_heads, config.head_dim),
    }
    words = weight.shape[::-1] if weight.num_in else weight.shape
    shape = tuple(size for word in words for size in heads.get(word, (sizes[word],)))
    return (config.num_layers, *shape) if weight.stacked else shape


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A contiguous transpose."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    copy_tiles(result, matrix.T)
    return result


def _cover(spans: Sequence[slice], shape: Sequence[int]) -> slice:
    """The range over the flattened axes that holds the spans, whatever they leave out of the inner axes."""
    size = math.prod(shape[1:])
    return slice(spans[0].start * size, spans[0].stop * size)


def _whole(span: slice, shape: Sequence[int]) -> tuple[tuple[slice, ...], slice]:
    """Slices of the axes that hold a range over them flattened, and the range within what they hold."""
    start, stop, _ = span.indices(math.prod(shape))
    size = math.prod(shape[1:])
    first, last = start // size, -(-stop // size)
    return (slice(first, last), *([ALL] * (len(shape) - 1))), slice(start - first * size, stop - first * size)
