"""Hugging Face's format: a folder of `config.json` and safetensors files, as transformers writes and loads it."""

import dataclasses
import functools
import json
import logging
import re
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from llama_jax.convert import bitsandbytes
from llama_jax.convert.huggingface_config import CONFIG_FILE, config_json, read_config, token_ids
from llama_jax.convert.mapping import Source, assemble, in_file_order
from llama_jax.convert.safetensors_file import Entry, open_safetensors, write_safetensors
from llama_jax.convert.tensors import ALL, BFLOAT16, Tensor, existing, tie
from llama_jax.convert.torch_file import open_torch_file, weights
from llama_jax.errors import InputError
from llama_jax.json_file import read_object, show_json
from llama_jax.placement import cast

logger = logging.getLogger(__name__)

_GENERATION_FILE = 'generation_config.json'
_WEIGHTS_FILE = 'model.safetensors'
_TORCH_FILE = 'pytorch_model.bin'
_INDEX = '{}.index.json'

# What a conversion carries along unchanged: the tokenizer in its several forms, sampling defaults, the licence.
# fmt: off
_CARRIED = (
    'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
    'vocab.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json', _GENERATION_FILE,
    'LICENSE', 'LICENSE.txt', 'NOTICE', 'Notice', 'USE_POLICY.md',
)
# fmt: on

_FLOATS = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
_EMBED, _HEAD, _SCORE = 'model.embed_tokens.weight', 'lm_head.weight', 'score.weight'
# Those of LlamaModel, the trunk alone, which lack `model.`.
_BASE_NAME = re.compile(r'(embed_tokens|norm|layers\.\d+)\..*')
# Buffers that models make themselves: of RoPE, and of masks in the first uploads.
_BUFFER = re.compile(
    r'(model\.)?(layers\.\d+\.self_attn\.)?(rotary_emb\.\w+|masked_bias|bias)|(model\.)?position_ids'
)
_FILE_NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}')  # in an index: of this folder, not above it


def open_source(folder: epath.PathLike) -> Source:
    """Opens a folder that transformers saved; reads headers only.

    Raises:
      InputError: it is no Llama, a file is missing or damaged, or the weights are not those of `config.json`.
    """
    folder = existing(folder)
    config = read_config(folder)
    found: dict[str, Tensor] = {}
    for name, tensor in bitsandbytes.with_whole_weights(_open_weights(folder), str(folder)).items():
        if _is_buffer(name):
            continue
        if tensor.dtype not in _FLOATS:
            raise InputError(f'{folder}: tensor {name} holds {tensor.dtype}, no weights; is it quantised?')
        full_name = f'model.{name}' if _BASE_NAME.fullmatch(name) else name
        if full_name in found:
            raise InputError(f'{folder} holds both {name} and {full_name}; one of them must go')
        found[full_name] = tensor
    if config.scalar_head and (score := found.get(_SCORE)) is not None:
        if tuple(score.shape) != (1, config.embed_dim):
            raise InputError(
                f'{folder}: {_SCORE} has shape {tuple(score.shape)}; a reward model gives one score, so it must be '
                f'{(1, config.embed_dim)}'
            )
        found[_SCORE] = _OneRow(score)
    head = found.pop(_HEAD, None) if config.tie_embeddings else None
    if head is not None:
        # transformers 4 drops a head of its own, 5 unties it: no reading would be right for both.
        refusal = (
            f'{folder}: {_HEAD} differs from {_EMBED}, although tie_word_embeddings is true in {CONFIG_FILE}; '
            'set it to false there to keep both'
        )
        if (tied := tie(found.get(_EMBED, head), head, refusal)) is None:
            raise InputError(refusal)
        found[_EMBED] = tied
        logger.info('%s: %s is the embedding (tie_word_embeddings)', folder, _HEAD)
    return assemble(found, 'huggingface', config, origin=str(folder))


# Weights.


@dataclasses.dataclass(frozen=True)
class _OneRow:
    """A matrix of one row as a vector."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.matrix.dtype

    def read(self, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        del columns
        return self.matrix.read(ALL, rows)[0]


def _open_weights(folder: epath.Path) -> Mapping[str, Tensor]:
    """All tensors of the folder's weight files, whichever are there first in the order in which transformers looks."""
    for name, open_file in ((_WEIGHTS_FILE, open_safetensors), (_TORCH_FILE, _open_torch)):
        if (folder / name).exists():
            return open_file(folder / name)
        if (folder / _INDEX.format(name)).exists():
            return _open_shards(folder / _INDEX.format(name), open_file)
    raise InputError(
        f'{folder} holds no weights ({_WEIGHTS_FILE} or {_INDEX.format(_WEIGHTS_FILE)}); '
        'copy its safetensors files there'
    )


def _open_torch(path: epath.Path) -> Mapping[str, Tensor]:
    """The tensors of a file of torch.save."""
    return weights(open_torch_file(path), str(path), (_BUFFER.pattern,))


def _open_shards(
    index: epath.Path, open_file: Callable[[epath.Path], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of the files that an index names; of a tensor in several files it says which one counts."""
    places = read_object(index).get('weight_map')
    if not isinstance(places, dict):
        raise InputError(f'{index} has no weight_map; copy or download it again')
    for name, file in places.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise InputError(
                f'{index}: tensor {show_json(name)} is said to be in {show_json(file)}, which is no file name'
            )
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        path = index.parent / file
        if not path.is_file():
            raise InputError(f'{path} is missing, and {index.name} names it; copy or download it again')
        for name, tensor in open_file(path).items():
            if name not in places and not _is_buffer(name):
                raise InputError(f'{path} holds tensor {name}, which {index.name} does not place there')
            if places.get(name) == file:
                tensors[name] = tensor
    if missing := {name for name in places.keys() - tensors.keys() if not _is_buffer(name)}:
        name = min(missing)
        raise InputError(
            f'{index.parent / places[name]} has no tensor {show_json(name)}, which {index.name} places there'
        )
    return tensors


def _is_buffer(name: str) -> bool:
    return _BUFFER.fullmatch(name) is not None


# Writing.


def carried_files(folder: epath.Path) -> dict[str, bytes]:
    """The files beside the weights that belong to the model whatever its format: tokenizer, chat template, licence."""
    return {name: (folder / name).read_bytes() for name in _CARRIED if (folder / name).is_file()}


def write(
    source: Source,
    folder: epath.Path,
    *,
    dtype: np.dtype | None = None,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    files: Mapping[str, bytes] = types.MappingProxyType({}),
    progress: Callable[[int], None] = lambda _: None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint as a folder that transformers loads; a few blocks of it are in memory at a time.

    Args:
      source: the opened checkpoint.
      folder: local, exists and is empty. `config.json` comes last: without it the folder is no checkpoint.
      dtype: float64, float32, float16 or bfloat16; None keeps each tensor's own.
      bos_id: the token that texts begin with, if known.
      eos_ids: the tokens that end a text, if known.
      files: written beside the weights, by name; see `carried_files`.
      progress: called with the number of bytes of weights written since the last call.
      shard_bytes: of weights a file holds at most, unless one tensor alone is larger.

    Raises:
      InputError: a value is beyond the range of `dtype`, or transformers does not know such an architecture.
    """
    config = source.config
    if config.embed_dim % config.num_heads:
        raise InputError(
            f'embed_dim {config.embed_dim} is not a multiple of num_heads {config.num_heads}, '
            'and transformers refuses that; convert to another format'
        )
    shards = _shards(_entries(source, dtype), shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / _WEIGHTS_FILE, shards[0], progress)
    else:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
            write_safetensors(folder / file, shard, progress)
            weight_map |= {entry.name: file for entry in shard}
        total_size = sum(entry.nbytes for shard in shards for entry in shard)
        index = {'metadata': {'total_size': total_size}, 'weight_map': dict(sorted(weight_map.items()))}
        _write_json(folder / _INDEX.format(_WEIGHTS_FILE), index)
    known = {key: value for key, value in token_ids(bos_id, eos_ids).items() if value is not None}
    _write_json(folder / _GENERATION_FILE, known)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    _write_json(folder / CONFIG_FILE, config_json(config, dtype or source.dtype, bos_id, eos_ids))


def _entries(source: Source, dtype: np.dtype | None) -> list[Entry]:
    """Every matrix under its name."""
    entries = []
    for weight, layer in in_file_order(source.config):
        tensor, name = source.tensors[weight.path][layer], weight.name('huggingface', layer)
        chosen = np.dtype(dtype or tensor.dtype)
        read = functools.partial(_read, tensor, chosen, name)
        shape = tuple(tensor.shape)
        if name == _SCORE:
            shape, read = (1, *shape), functools.partial(_read_row, read)
        entries.append(Entry(name, shape, chosen, read))
    return entries


def _read(tensor: Tensor, dtype: np.dtype, name: str, rows: slice) -> np.ndarray:
    return cast(tensor.read(rows), dtype, name)


def _read_row(read: Callable[[slice], np.ndarray], rows: slice) -> np.ndarray:
    return read(ALL)[None][rows]


def _shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if shards[-1] and entry.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def _write_json(path: epath.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + '\n')
