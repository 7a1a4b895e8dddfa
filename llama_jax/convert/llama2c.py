"""llama2.c's checkpoints, to read: its training script's `.pt`, and the `.bin` that its C programs run.

A `.bin` has a header of seven numbers and then the values of all tensors one after the other, so the header must
account for the file's size to the byte. Formats: llama2.c's export.py, versions 0, 1 and 2.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath

from llama_jax.convert.mapping import Source, assemble
from llama_jax.convert.meta import assemble_meta
from llama_jax.convert.meta_params import parse_params, to_config
from llama_jax.convert.tensors import ALL, FileTensor, Tensor, existing
from llama_jax.convert.torch_file import open_torch_file, weights
from llama_jax.errors import InputError, refusals_of
from llama_jax.models.config import LlamaConfig
from llama_jax.storage import read_range

MAGIC = b'24ka'  # of versions 1 and 2; 0 has none
HEADER_BYTES = {0: 28, 1: 256, 2: 256}  # by version
_FLOAT32 = np.dtype('<f4')
_INT8 = np.dtype('i1')


def open_source(path: epath.PathLike) -> Source:
    """A `.pt` or `.bin` of llama2.c, told apart by their first bytes.

    Raises:
      InputError: it is damaged, or another kind of file.
    """
    path = existing(path)
    header = read_range(path, 0, max(HEADER_BYTES.values()))
    return _open_pt(path) if header.startswith(b'PK') else _open_bin(path, header)


def _open_pt(path: epath.Path) -> Source:
    checkpoint = open_torch_file(path)
    if not isinstance(checkpoint, Mapping) or not {'model', 'model_args'} <= checkpoint.keys():
        raise InputError(f'{path} is no checkpoint of llama2.c, which has keys model and model_args')
    state = checkpoint['model']
    if isinstance(state, Mapping):  # torch.compile puts a prefix before every name
        state = {k.removeprefix('_orig_mod.') if isinstance(k, str) else k: v for k, v in state.items()}
    found: dict[str, Tensor] = {**weights(state, str(path), (r'freqs_(cos|sin)',))}
    params = parse_params(checkpoint['model_args'], f'{path}: model_args')
    return assemble_meta(found, params, str(path))


@dataclasses.dataclass(frozen=True)
class GroupQuantized:
    """Values q * scale, a scale for every `group` values that follow each other; groups may span rows.

    Attributes:
      values: int8, as one vector.
      scales: float32.
    """

    values: FileTensor
    scales: FileTensor
    shape: tuple[int, ...]
    group: int
    dtype: np.dtype = _FLOAT32

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """See `Tensor.read`."""
        start, stop, _ = rows.indices(self.shape[0])
        stop = max(start, stop)
        width = math.prod(self.shape[1:])
        first, last = start * width // self.group, -(-stop * width // self.group)
        values = self.values.read(slice(first * self.group, last * self.group)).reshape(-1, self.group)
        with np.errstate(all='ignore'):  # of a damaged file
            block = values * self.scales.read(slice(first, last))[:, None]
        begin = start * width - first * self.group
        return block.reshape(-1)[begin : begin + (stop - start) * width].reshape(-1, width)[:, columns]


def _open_bin(path: epath.Path, header: bytes) -> Source:
    length = path.stat().length
    version, at, group = 0, 0, 0
    if len(header) >= 8 and header.startswith(MAGIC):
        version, at = struct.unpack_from('<i', header, 4)[0], 8
        if version not in (1, 2):
            raise InputError(f"{path} is version {version} of llama2.c's format; 0, 1 and 2 can be read")
    if len(header) < HEADER_BYTES[version]:
        raise InputError(f'{path} has {length} bytes; a .bin of llama2.c is longer')
    dim, mlp_dim, layers, heads, kv_heads, vocab_size, seq_len = struct.unpack_from('<7i', header, at)
    tied = vocab_size > 0
    if version:
        tied, group = struct.unpack_from('<?i', header, 36)
    names = 'dim', 'hidden_dim', 'n_layers', 'n_heads', 'n_kv_heads', 'vocab_size', 'max_seq_len'
    sizes = dim, mlp_dim, layers, heads, kv_heads, abs(vocab_size), seq_len
    if version == 2 and group < 1:
        raise InputError(f'{path}: the group size of its int8 weights is {group}; it must be at least 1')
    params = parse_params(dict(zip(names, sizes, strict=True)), str(path))
    with refusals_of(path):
        config = to_config(params, vocab_size=abs(vocab_size), tied=tied, dtype=_FLOAT32)
    layout = list(_layout(config, version))
    expected = HEADER_BYTES[version] + sum(
        count * _bytes(math.prod(shape), group if len(shape) == 2 else 0) for _, shape, count in layout
    )
    if expected != length:
        raise InputError(
            f'{path} has {length} bytes, but its header (version {version}: dim {dim}, {layers} layers, vocabulary '
            f'{vocab_size}) makes {expected}; it is cut off, or no .bin of llama2.c'
        )
    return assemble(dict(_tensors(path, layout, version, group)), 'meta', config, origin=str(path))


def _layout(config: LlamaConfig, version: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and number (of layers) of the tensors in the order of the file."""
    embed, mlp, layers = config.embed_dim, config.mlp_dim, config.num_layers
    key_values = config.num_kv_heads * config.head_dim
    table = (config.vocab_size, embed)
    attention_norm = 'layers.{}.attention_norm.weight', (embed,), layers
    ffn_norm = 'layers.{}.ffn_norm.weight', (embed,), layers
    final_norm = 'norm.weight', (embed,), 1
    embedding = 'tok_embeddings.weight', table, 1
    attention = (
        ('layers.{}.attention.wq.weight', (embed, embed), layers),
        ('layers.{}.attention.wk.weight', (key_values, embed), layers),
        ('layers.{}.attention.wv.weight', (key_values, embed), layers),
        ('layers.{}.attention.wo.weight', (embed, embed), layers),
    )
    ffn = (
        ('layers.{}.feed_forward.w1.weight', (mlp, embed), layers),
        ('layers.{}.feed_forward.w2.weight', (embed, mlp), layers),
        ('layers.{}.feed_forward.w3.weight', (mlp, embed), layers),
    )
    if version == 0:
        yield from (embedding, attention_norm, *attention, ffn_norm, *ffn, final_norm)
        yield '', (config.max_seq_len * config.head_dim,), 1  # cosines and sines, which nobody reads
    else:
        yield from (attention_norm, ffn_norm, final_norm, embedding, *attention, *ffn)
    if not config.tie_embeddings:
        yield 'output.weight', table, 1


def _bytes(count: int, group: int) -> int:
    return 4 * count if not group else count + 4 * (count // group)


def _tensors(
    path: epath.Path, layout: list[tuple[str, tuple[int, ...], int]], version: int, group: int
) -> Iterator[tuple[str, Tensor]]:
    offset = HEADER_BYTES[version]
    for name, shape, layers in layout:
        values = math.prod(shape)
        for layer in range(layers):
            tensor: Tensor = FileTensor(path, offset, shape, _FLOAT32)
            if group and len(shape) == 2:
                if values % group:
                    raise InputError(
                        f'{path}: {name.format(layer)} does not divide into groups of {group} values'
                    )
                scales = FileTensor(path, offset + values, (values // group,), _FLOAT32)
                tensor = GroupQuantized(FileTensor(path, offset, (values,), _INT8), scales, shape, group)
                offset += values + 4 * (values // group)
            else:
                offset += 4 * values
            if name:
                yield name.format(layer), tensor
