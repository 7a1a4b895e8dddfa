"""The one table of weights: ours, Meta's, Hugging Face's and GGUF's name of each, and how its values are laid out.

Every format is read into, and written from, the same matrices: [out, in] as torch stores a linear layer, with the rows
of q and k half-split. Those are Hugging Face's own; Meta, GGUF and llama2.c interleave q and k (`rotary`); ours are the
transposes, with heads on an axis of their own and all layers stacked.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from llama_jax.convert.tensors import ALL, HalfSplit, Tensor
from llama_jax.models.config import LlamaConfig
from llama_jax.types import InputError

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
)
# fmt: on


def weights_of(config: LlamaConfig) -> tuple[Weight, ...]:
    """The rows that a model of this config has: no head where it is tied to the embedding."""
    return tuple(w for w in WEIGHTS if not (w.path == 'head' and config.tie_embeddings))


def layers_of(weight: Weight, config: LlamaConfig) -> range:
    """The layers of a stacked weight; one turn for the others."""
    return range(config.num_layers if weight.stacked else 1)


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


# Between a matrix [out, in] and one layer of our leaf: the transpose, with its axes split into ours.


def to_matrix(leaf: np.ndarray, weight: Weight) -> np.ndarray:
    """One whole layer of our leaf as the matrix; a view where that is possible."""
    if not weight.num_in:
        return leaf
    size_in = math.prod(leaf.shape[: weight.num_in])
    return leaf.reshape(size_in, -1).T


def read_leaf(source: Source, weight: Weight, index: tuple[slice, ...]) -> np.ndarray:
    """A block of our leaf, reading only what it needs.

    Args:
      source: an opened checkpoint.
      weight: which leaf.
      index: slices of step 1 along the leaf's axes, the stacked layers first.
    """
    shape = leaf_shape(weight, source.config)
    spans = [slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True)]
    tensors = source.tensors[weight.path]
    if not weight.stacked:
        return tensors[0].read(*spans)
    blocks = [_read_layer(tensor, weight, spans[1:], shape[1:]) for tensor in tensors[spans[0]]]
    return np.stack(blocks)


def _read_layer(tensor: Tensor, weight: Weight, spans: list[slice], shape: tuple[int, ...]) -> np.ndarray:
    if not weight.num_in:
        return tensor.read(*spans)
    cut = weight.num_in
    columns, inner_columns = _flatten(spans[:cut], shape[:cut])
    rows, inner_rows = _flatten(spans[cut:], shape[cut:])
    block = transpose(tensor.read(rows, columns))
    outer_in = (columns.stop - columns.start) // math.prod(shape[1:cut])
    outer_out = (rows.stop - rows.start) // math.prod(shape[cut + 1 :])
    block = block.reshape(outer_in, *shape[1:cut], outer_out, *shape[cut + 1 :])
    return block[(ALL, *inner_columns, ALL, *inner_rows)]


def _flatten(spans: Sequence[slice], shape: Sequence[int]) -> tuple[slice, Sequence[slice]]:
    """One range over flattened axes that covers the spans, and what to cut from the axes after the first."""
    size = math.prod(shape[1:])
    return slice(spans[0].start * size, spans[0].stop * size), spans[1:]


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A contiguous transpose, made in strips that stay in the processor's cache: twice as fast as NumPy's own."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, matrix.shape[0], 256):
        for begin in range(0, matrix.shape[1], 256):
            tile = slice(start, start + 256), slice(begin, begin + 256)
            result[tile[::-1]] = matrix[tile].T
    return result


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
