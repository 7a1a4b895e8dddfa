"""Hugging Face's format: a folder of `config.json` and safetensors files, as transformers writes and loads it."""

import functools
import json
import logging
import re
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from llama_jax.convert.mapping import Source, assemble, in_file_order
from llama_jax.convert.safetensors_file import Entry, open_safetensors, write_safetensors
from llama_jax.convert.tensors import BFLOAT16, Tensor, tie
from llama_jax.convert.torch_file import open_torch_file, weights
from llama_jax.json_file import read_object, show_json
from llama_jax.models.config import LlamaConfig, RopeScaling
from llama_jax.placement import cast
from llama_jax.types import InputError, refusals_of

logger = logging.getLogger(__name__)

CONFIG_FILE = 'config.json'
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

_ARCHITECTURES = {'LlamaForCausalLM', 'LLaMAForCausalLM', 'LlamaModel'}  # the second in uploads of March 2023
_MAX_SIZE = 2**31 - 1
_FLOATS = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
_EMBED, _HEAD = 'model.embed_tokens.weight', 'lm_head.weight'
# Those of LlamaModel, the trunk alone, which lack `model.`.
_BASE_NAME = re.compile(r'(embed_tokens|norm|layers\.\d+)\..*')
# Buffers that models make themselves: of RoPE, and of masks in the first uploads.
_BUFFER = re.compile(
    r'(model\.)?(layers\.\d+\.self_attn\.)?(rotary_emb\.\w+|masked_bias|bias)|(model\.)?position_ids'
)
_FILE_NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}')  # in an index: of this folder, not above it


def open_source(folder: epath.Path) -> Source:
    """Opens a folder that transformers saved; reads headers only.

    Raises:
      InputError: it is no Llama, a file is missing or damaged, or the weights are not those of `config.json`.
    """
    config = read_config(folder)
    found: dict[str, Tensor] = {}
    for name, tensor in _open_weights(folder).items():
        if _is_buffer(name):
            continue
        if tensor.dtype not in _FLOATS:
            raise InputError(f'{folder}: tensor {name} holds {tensor.dtype}, no weights; is it quantised?')
        full_name = f'model.{name}' if _BASE_NAME.fullmatch(name) else name
        if full_name in found:
            raise InputError(f'{folder} holds both {name} and {full_name}; one of them must go')
        found[full_name] = tensor
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


def _open_weights(folder: epath.Path) -> Mapping[str, Tensor]:
    """All tensors of the folder's weight files, whichever are there first in the order in which transformers looks."""
    for name, open_file in ((_WEIGHTS_FILE, open_safetensors), (_TORCH_FILE, _open_torch)):
        if (folder / name).exists():
            return open_file(folder / name)
        if (folder / _INDEX.format(name)).exists():
            return _open_shards(folder / _INDEX.format(name), open_file)
    hint = 'copy its safetensors files there'
    if (folder / 'adapter_model.safetensors').exists():
        hint = 'it is a LoRA adapter: merge it into its base model with peft first'
    raise InputError(f'{folder} holds no weights ({_WEIGHTS_FILE} or {_INDEX.format(_WEIGHTS_FILE)}); {hint}')


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
        if not path.exists():
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


# The configuration. Absent keys have the defaults of transformers' LlamaConfig.


def read_config(folder: epath.Path) -> LlamaConfig:
    """The architecture that `config.json` describes.

    Raises:
      InputError: there is none, it is damaged, or describes what is no Llama of ours.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise InputError(f'{folder} is no Hugging Face folder: it has no {CONFIG_FILE}')
    values = read_object(path)
    _refuse_others(values, path)
    size = functools.partial(_size, values, path)
    num_heads, embed_dim = size('num_attention_heads'), size('hidden_size')
    if values.get('head_dim') is None and embed_dim % num_heads:
        raise InputError(
            f'{path}: hidden_size {embed_dim} is not a multiple of num_attention_heads {num_heads}, '
            'and head_dim is not given'
        )
    rope_theta, rope_scaling = _rope(values, path)
    config = functools.partial(
        LlamaConfig,
        vocab_size=size('vocab_size'),
        embed_dim=embed_dim,
        mlp_dim=size('intermediate_size'),
        num_layers=size('num_hidden_layers'),
        num_heads=num_heads,
        num_kv_heads=size('num_key_value_heads', num_heads),
        head_dim=size('head_dim', embed_dim // num_heads),
        max_seq_len=size('max_position_embeddings', 2048),
        norm_eps=_number(values, 'rms_norm_eps', path, 1e-6, most=1.0),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=_flag(values, 'tie_word_embeddings', path),
    )
    with refusals_of(path):  # of how the fields go together
        return config()


def _refuse_others(values: dict, path: epath.Path) -> None:
    """Other architectures, quantised weights, and the options of transformers' Llama that no Llama uses."""
    architectures = values.get('architectures') or ['LlamaForCausalLM']
    if not isinstance(architectures, list) or not set(map(str, architectures)) <= _ARCHITECTURES:
        raise InputError(
            f'{path}: architectures is {show_json(architectures)}, but only a Llama language model can be read '
            f'({", ".join(sorted(_ARCHITECTURES))})'
        )
    if (kind := values.get('model_type', 'llama')) != 'llama':
        raise InputError(f'{path}: model_type is {show_json(kind)}, but only llama can be read')
    for key in ('quantization_config', 'quantization'):
        if (quantization := values.get(key)) is not None:
            method = quantization.get('quant_method') if isinstance(quantization, dict) else quantization
            raise InputError(
                f'{path}: the weights are quantised ({key} {show_json(method)}), which cannot be read; '
                'take the release in bfloat16 or float16'
            )
    if (activation := values.get('hidden_act', 'silu')) != 'silu':
        raise InputError(f'{path}: hidden_act is {show_json(activation)}; a Llama has silu')
    for key in ('attention_bias', 'mlp_bias'):
        if _flag(values, key, path):
            raise InputError(f'{path}: {key} is true; a Llama has no biases')


def _rope(values: dict, path: epath.Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling: transformers 4 writes `rope_theta` and `rope_scaling`, 5 both as one `rope_parameters`."""
    # The first wins, as in transformers.
    key = 'rope_scaling' if values.get('rope_scaling') else 'rope_parameters'
    rope = values.get(key)
    rope = {} if rope is None else rope
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f'{path}: {key} is {show_json(rope)}, it must be one flat object or null')
    theta = _number(rope if rope.get('rope_theta') is not None else values, 'rope_theta', path, 10_000.0)
    for place in (rope, values):
        if _number(place, 'partial_rotary_factor', path, 1.0) != 1.0:
            raise InputError(f'{path}: partial_rotary_factor is not 1; a Llama rotates whole heads')
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind == 'default':
        return theta, None
    if kind != 'llama3':
        raise InputError(
            f'{path}: {key} is of type {show_json(kind)}; the Llamas have only llama3 and default'
        )
    low, high = (_number(rope, name, path) for name in ('low_freq_factor', 'high_freq_factor'))
    if low >= high:
        raise InputError(f'{path}: low_freq_factor {low} must be less than high_freq_factor {high} in {key}')
    return theta, RopeScaling(
        factor=_number(rope, 'factor', path),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_seq_len=_size(rope, path, 'original_max_position_embeddings'),
    )


def _size(values: dict, path: epath.Path, key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise InputError(
            f'{path}: {key} is {show_json(value)}, it must be a whole number from 1 to {_MAX_SIZE}'
        )
    return value


def _number(
    values: dict, key: str, path: epath.Path, default: float | None = None, *, most: float = 1e12
) -> float:
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
        raise InputError(
            f'{path}: {key} is {show_json(value)}, it must be a number above 0, at most {most:g}'
        )
    return float(value)


def _flag(values: dict, key: str, path: epath.Path) -> bool:
    value = values.get(key) or False
    if not isinstance(value, bool):
        raise InputError(f'{path}: {key} is {show_json(value)}, it must be true or false')
    return value


# Writing.


def config_json(config: LlamaConfig, dtype: np.dtype, bos_id: int | None, eos_ids: Sequence[int]) -> dict:
    """What `config.json` holds, in the keys that transformers 4 and 5 both read.

    Args:
      config: the architecture.
      dtype: of the weights.
      bos_id: the token that texts begin with, if there is one.
      eos_ids: the tokens that end a text.
    """
    scaling = config.rope_scaling
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'vocab_size': config.vocab_size,
        'hidden_size': config.embed_dim,
        'intermediate_size': config.mlp_dim,
        'num_hidden_layers': config.num_layers,
        'num_attention_heads': config.num_heads,
        'num_key_value_heads': config.num_kv_heads,
        'head_dim': config.head_dim,
        'hidden_act': 'silu',
        'max_position_embeddings': config.max_seq_len,
        'rms_norm_eps': config.norm_eps,
        'rope_theta': config.rope_theta,
        'rope_scaling': scaling
        and {
            'rope_type': 'llama3',
            'factor': scaling.factor,
            'low_freq_factor': scaling.low_freq_factor,
            'high_freq_factor': scaling.high_freq_factor,
            'original_max_position_embeddings': scaling.original_max_seq_len,
        },
        'tie_word_embeddings': config.tie_embeddings,
        'attention_bias': False,
        'mlp_bias': False,
        'attention_dropout': 0.0,
        'initializer_range': 0.02,
        'pretraining_tp': 1,
        'use_cache': True,
        **_token_ids(bos_id, eos_ids),
        'torch_dtype': dtype.name,
    }


def _token_ids(bos_id: int | None, eos_ids: Sequence[int]) -> dict:
    eos = list(eos_ids)
    return {'bos_token_id': bos_id, 'eos_token_id': eos if len(eos) > 1 else eos[0] if eos else None}


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
    known = {key: value for key, value in _token_ids(bos_id, eos_ids).items() if value is not None}
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
        entries.append(Entry(name, tuple(tensor.shape), chosen, read))
    return entries


def _read(tensor: Tensor, dtype: np.dtype, name: str, rows: slice) -> np.ndarray:
    return cast(tensor.read(rows), dtype, name)


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
