"""The architecture that a Hugging Face `config.json` describes, read and written.

Absent keys have the defaults of transformers' LlamaConfig.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from etils import epath

from llama_jax.errors import InputError, refusals_of
from llama_jax.json_file import read_object, show_json
from llama_jax.models.config import LlamaConfig, RopeScaling

CONFIG_FILE = 'config.json'
_REWARD_MODEL = 'LlamaForSequenceClassification'
# The second in uploads of March 2023.
_ARCHITECTURES = {'LlamaForCausalLM', 'LLaMAForCausalLM', 'LlamaModel', _REWARD_MODEL}
_MAX_SIZE = 2**31 - 1


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
    rope_theta, rope_scaling, max_seq_len = _rope(values, path)
    config = functools.partial(
        LlamaConfig,
        vocab_size=size('vocab_size'),
        embed_dim=embed_dim,
        mlp_dim=size('intermediate_size'),
        num_layers=size('num_hidden_layers'),
        num_heads=num_heads,
        num_kv_heads=size('num_key_value_heads', num_heads),
        head_dim=size('head_dim', embed_dim // num_heads),
        max_seq_len=max_seq_len,
        norm_eps=_number(values, 'rms_norm_eps', path, 1e-6, most=1.0),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=_flag(values, 'tie_word_embeddings', path),
        scalar_head=_is_reward_model(values, path),
    )
    with refusals_of(path):  # of how the fields go together
        return config()


def _refuse_others(values: dict, path: epath.Path) -> None:
    """Other architectures, quantised weights, and the options of transformers' Llama that no Llama uses."""
    architectures = values.get('architectures') or ['LlamaForCausalLM']
    if not isinstance(architectures, list) or not set(map(str, architectures)) <= _ARCHITECTURES:
        raise InputError(
            f'{path}: architectures is {show_json(architectures)}, but only a Llama language or reward model can '
            f'be read ({", ".join(sorted(_ARCHITECTURES))})'
        )
    if (kind := values.get('model_type', 'llama')) != 'llama':
        raise InputError(f'{path}: model_type is {show_json(kind)}, but only llama can be read')
    for key in ('quantization_config', 'quantization'):
        quantization = values.get(key)
        method = quantization.get('quant_method') if isinstance(quantization, dict) else quantization
        if isinstance(quantization, dict) and method == 'bitsandbytes' and quantization.get('load_in_4bit'):
            continue
        if quantization is not None:
            raise InputError(
                f'{path}: the weights are quantised ({key} {show_json(method)}), which cannot be read (4 bits of '
                'bitsandbytes can); take the release in bfloat16 or float16'
            )
    if (activation := values.get('hidden_act', 'silu')) != 'silu':
        raise InputError(f'{path}: hidden_act is {show_json(activation)}; a Llama has silu')
    for key in ('attention_bias', 'mlp_bias'):
        if _flag(values, key, path):
            raise InputError(f'{path}: {key} is true; a Llama has no biases')


def _is_reward_model(values: dict, path: epath.Path) -> bool:
    """Whether it classifies sequences, by one number: with several it is a classifier, which has no place here."""
    if _REWARD_MODEL not in (values.get('architectures') or ()):
        return False
    labels = values.get('id2label')
    number = values.get('num_labels', len(labels) if isinstance(labels, dict) else 2)
    if number != 1:
        raise InputError(
            f'{path}: num_labels is {show_json(number)}: a classifier; a reward model gives one score, so it must be 1'
        )
    return True


def _rope(values: dict, path: epath.Path) -> tuple[float, RopeScaling | None, int]:
    """Base, scaling and context: transformers 4 writes `rope_theta` and `rope_scaling`, 5 both as `rope_parameters`."""
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
    context = _size(values, path, 'max_position_embeddings', 2048)
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind == 'default':
        return theta, None, context
    if kind not in ('llama3', 'linear', 'dynamic', 'yarn'):  # longrope: of Phi alone
        raise InputError(
            f'{path}: {key} is of type {show_json(kind)}; the Llamas have only llama3 and default, and linear, '
            'dynamic and yarn'
        )
    # Beside the scaling it has priority, as in transformers.
    at = values if values.get('original_max_position_embeddings') is not None else rope
    if kind == 'llama3':
        low, high = (_number(rope, name, path) for name in ('low_freq_factor', 'high_freq_factor'))
        if low >= high:
            raise InputError(
                f'{path}: low_freq_factor {low} must be less than high_freq_factor {high} in {key}'
            )
        original = _size(at, path, 'original_max_position_embeddings')
        return theta, RopeScaling(_number(rope, 'factor', path), low, high, original), context
    original = _size(at, path, 'original_max_position_embeddings', context)
    factor = _number(rope, 'factor', path, context / original if kind == 'yarn' else None, most=1e6)
    if kind == 'dynamic':  # within the context that is stated nothing is stretched
        return theta, RopeScaling(factor, kind='dynamic', original_max_seq_len=context), context
    if kind == 'linear':
        # Those who stretch a context this way state what it was before.
        stated = at.get('original_max_position_embeddings') is not None
        stretched = context if stated else min(round(context * factor), _MAX_SIZE)
        return theta, RopeScaling(factor, kind='linear', original_max_seq_len=original), max(stretched, 1)
    return theta, _yarn(rope, path, factor, original), context


def _yarn(rope: dict, path: epath.Path, factor: float, original: int) -> RopeScaling:
    """Peng et al. 2023; the factor of attention as transformers works it out."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weights = [rope.get(name) for name in ('mscale', 'mscale_all_dim')]
    attention = mscale(1.0)
    if all(weights):
        over, under = (mscale(_number(rope, name, path)) for name in ('mscale', 'mscale_all_dim'))
        attention = float(f'{over / under:.6g}')  # what GGUF can say too
    if (truncate := rope.get('truncate')) is not None and not isinstance(truncate, bool):
        raise InputError(f'{path}: truncate is {show_json(truncate)}, it must be true or false')
    with refusals_of(path):
        return RopeScaling(
            factor, kind='yarn', original_max_seq_len=original,
            attention_factor=_number(rope, 'attention_factor', path, attention),
            beta_fast=_number(rope, 'beta_fast', path, 32.0), beta_slow=_number(rope, 'beta_slow', path, 1.0),
            truncate=truncate is not False,
        )  # fmt: skip


def _rope_json(config: LlamaConfig) -> tuple[dict | None, int]:
    """`rope_scaling` and `max_position_embeddings`, which `_rope` reads back."""
    scaling, context = config.rope_scaling, config.max_seq_len
    if scaling is None:
        return None, context
    original = scaling.original_max_seq_len
    values: dict = {'rope_type': scaling.kind, 'factor': scaling.factor}
    if scaling.kind == 'llama3':
        values |= {'low_freq_factor': scaling.low_freq_factor, 'high_freq_factor': scaling.high_freq_factor}
    if scaling.kind == 'yarn':
        values |= {name: getattr(scaling, name) for name in ('attention_factor', 'beta_fast', 'beta_slow')}
        values |= {} if scaling.truncate else {'truncate': False}
    if scaling.kind == 'linear' and round(original * scaling.factor) == context:
        return values, original
    if scaling.kind == 'dynamic':
        return values, context
    return values | {'original_max_position_embeddings': original}, context


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


def config_json(config: LlamaConfig, dtype: np.dtype, bos_id: int | None, eos_ids: Sequence[int]) -> dict:
    """What `config.json` holds, in the keys that transformers 4 and 5 both read.

    Args:
      config: the architecture.
      dtype: of the weights.
      bos_id: the token that texts begin with, if there is one.
      eos_ids: the tokens that end a text.
    """
    scaling, context = _rope_json(config)
    # Which of a row's tokens is the last one transformers finds by the padding: an id that ends no sequence.
    padding = next(number for number in range(len(eos_ids) + 1) if number not in eos_ids)
    return {
        'architectures': [_REWARD_MODEL if config.scalar_head else 'LlamaForCausalLM'],
        'model_type': 'llama',
        'vocab_size': config.vocab_size,
        'hidden_size': config.embed_dim,
        'intermediate_size': config.mlp_dim,
        'num_hidden_layers': config.num_layers,
        'num_attention_heads': config.num_heads,
        'num_key_value_heads': config.num_kv_heads,
        'head_dim': config.head_dim,
        'hidden_act': 'silu',
        'max_position_embeddings': context,
        'rms_norm_eps': config.norm_eps,
        'rope_theta': config.rope_theta,
        'rope_scaling': scaling,
        'tie_word_embeddings': config.tie_embeddings,
        'attention_bias': False,
        'mlp_bias': False,
        'attention_dropout': 0.0,
        'initializer_range': 0.02,
        'pretraining_tp': 1,
        'use_cache': True,
        **token_ids(bos_id, eos_ids),
        **(
            {'id2label': {'0': 'score'}, 'label2id': {'score': 0}, 'pad_token_id': padding}
            if config.scalar_head
            else {}
        ),
        'torch_dtype': dtype.name,
    }


def token_ids(bos_id: int | None, eos_ids: Sequence[int]) -> dict:
    """The keys of BOS and of all that ends a text, as `generation_config.json` has them too."""
    eos = list(eos_ids)
    return {'bos_token_id': bos_id, 'eos_token_id': eos if len(eos) > 1 else eos[0] if eos else None}
