"""Meta's `params.json`, and the architecture that it leaves to be guessed: FFN size, RoPE scaling and context.

It says neither the size of the FFN (a rule makes it), nor the context (a release has one), nor the factor of the RoPE
scaling (Meta's code has one for all). What is written is read back exactly: keys that Meta's releases do not have are
added only where the guess would be wrong.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from llama_jax.convert.torch_pickle import show
from llama_jax.errors import InputError
from llama_jax.json_file import read_object
from llama_jax.models.config import LlamaConfig, RopeScaling
from llama_jax.models.presets import PRESETS

_MAX_BYTES = 1 << 20
_MAX_INT = 2**31 - 1
# Fields that need not agree for two architectures to be of one released shape.
_ASIDE = ('max_seq_len', 'norm_eps', 'vocab_size', 'tie_embeddings')
# (dim, FFN size): (multiple_of, ffn_dim_multiplier), where Meta's differ from the first that the search would find.
_RELEASED = {
    (2048, 8192): (256, 1.5),
    (3072, 8192): (256, 1.0),
    (4096, 14336): (1024, 1.3),
    (8192, 28672): (4096, 1.3),
    (16384, 53248): (4096, 1.2),
}


@dataclasses.dataclass(frozen=True)
class Params:
    """The keys of `params.json` that matter, by Meta's names (`ModelArgs`), and checked.

    Attributes:
      vocab_size: None where it is absent or -1, as in LLaMA 1 and 2.
      rope_scaling_factor: of newer releases of Meta's code, and ours.
      hidden_dim: the FFN size itself, as newer llama2.c has it.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None
    multiple_of: int
    ffn_dim_multiplier: float | None
    norm_eps: float
    rope_theta: float
    use_scaled_rope: bool
    rope_scaling_factor: float | None
    rope_high_freq_factor: float | None
    max_seq_len: int | None
    hidden_dim: int | None

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.n_heads

    @property
    def mlp_dim(self) -> int:
        """Width of the feed-forward layer, as Meta's code rounds it."""
        return self.hidden_dim or mlp_dim(self.dim, self.multiple_of, self.ffn_dim_multiplier)


def mlp_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Size of the FFN by Meta's rule (`FeedForward` in llama/model.py)."""
    size = int(2 * 4 * dim / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return -(-size // multiple_of) * multiple_of


def read_params(path: epath.Path) -> Params:
    """`params.json`, whose keys may stand under "model" and of which unknown ones are ignored, as Meta's code does.

    Raises:
      InputError: it is not valid, or of quantised weights.
    """
    if not path.exists():
        raise InputError(f'{path} is missing; it holds the sizes of the model beside consolidated.*.pth')
    values = read_object(path, _MAX_BYTES)
    return parse_params(values['model'] if isinstance(values.get('model'), dict) else values, str(path))


def parse_params(values: Any, origin: str) -> Params:
    """Checks what a file says, and fills in what is left out.

    Args:
      values: a dict by Meta's names.
      origin: the file, for messages.

    Raises:
      InputError: a value is missing or impossible; its key is named.
    """
    if not isinstance(values, Mapping):
        raise InputError(f'{origin} holds {show(values)} where keys such as dim, n_layers and n_heads belong')
    for key in ('quantization_args', 'lora_args'):
        if values.get(key):
            raise InputError(
                f'{origin} has {key}: these are quantised weights in a layout of their own; take the bf16 release'
            )

    size = functools.partial(_number, values, origin, int, _MAX_INT)
    number = functools.partial(_number, values, origin, float)
    scaled = values.get('use_scaled_rope') or False
    if not isinstance(scaled, bool):
        raise InputError(f'{origin}: use_scaled_rope is {show(scaled)}; it must be true or false')
    heads = size('n_heads')
    params = Params(
        dim=size('dim'),
        n_layers=size('n_layers'),
        n_heads=heads,
        n_kv_heads=size('n_kv_heads', heads),
        vocab_size=size('vocab_size', None) if values.get('vocab_size') != -1 else None,
        multiple_of=size('multiple_of', 256),
        ffn_dim_multiplier=number(1e9, 'ffn_dim_multiplier', None),
        norm_eps=number(1, 'norm_eps', 1e-5),
        rope_theta=number(1e12, 'rope_theta', 10_000.0),
        use_scaled_rope=scaled,
        rope_scaling_factor=number(1e6, 'rope_scaling_factor', None),
        rope_high_freq_factor=number(1e6, 'rope_high_freq_factor', None),
        max_seq_len=size('max_seq_len', None),
        hidden_dim=size('hidden_dim', None),
    )
    if params.dim % (2 * heads):
        raise InputError(
            f'{origin}: dim {params.dim} over n_heads {heads} is no size of a head, an even number of values'
        )
    if heads % params.n_kv_heads:
        raise InputError(f'{origin}: n_heads {heads} is not a multiple of n_kv_heads {params.n_kv_heads}')
    return params


def _number(
    values: Mapping[str, Any], origin: str, kind: type, largest: int | float, key: str, default: Any = ...
) -> Any:
    """A number above 0 and not above `largest`, or the default where there is none; without one, it must be there."""
    value = values.get(key)
    if value is None and default is not ...:
        return default
    if value is None:
        raise InputError(f'{origin} has no {key}')
    sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= largest
    if not sound or (kind is int and value != int(value)):
        allowed = (
            f'a whole number from 1 to {largest}' if kind is int else f'a number above 0, to {largest:g}'
        )
        raise InputError(f'{origin}: {key} is {show(value)}; it must be {allowed}')
    return kind(value)


def to_config(params: Params, *, vocab_size: int, tied: bool, dtype: np.dtype) -> LlamaConfig:
    """The architecture.

    Args:
      params: what the file says.
      vocab_size: rows of the embedding.
      tied: the head is the embedding.
      dtype: of the weights, by which alone LLaMA 1 can be told from Llama 2-Chat.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        embed_dim=params.dim,
        mlp_dim=params.mlp_dim,
        num_layers=params.n_layers,
        num_heads=params.n_heads,
        num_kv_heads=params.n_kv_heads,
        head_dim=params.head_dim,
        max_seq_len=params.max_seq_len or 1,
        norm_eps=params.norm_eps,
        rope_theta=params.rope_theta,
        tie_embeddings=tied,
    )
    if params.use_scaled_rope:
        scaling = RopeScaling(factor=params.rope_scaling_factor or _scaling_factor(config))
        if params.rope_high_freq_factor:
            scaling = dataclasses.replace(scaling, high_freq_factor=params.rope_high_freq_factor)
        config = dataclasses.replace(config, rope_scaling=scaling)
    return config if params.max_seq_len else dataclasses.replace(config, max_seq_len=_context(config, dtype))


def _scaling_factor(config: LlamaConfig) -> float:
    """32 for the shapes of Llama 3.2's 1B and 3B, 8 for all others.

    Meta's code has 8 for every release, but its maintainers confirmed 32 for these two (llama-models issue 241).
    """
    shapes = [PRESETS['llama3_2_1b'], PRESETS['llama3_2_3b']]
    return 32.0 if any(_same_but(config, shape, 'rope_scaling', *_ASIDE) for shape in shapes) else 8.0


def _context(config: LlamaConfig, dtype: np.dtype) -> int:
    """Tokens of context, by the released model of the same shape, else by the family.

    LLaMA 1 and Llama 2 share two shapes. LLaMA 1's have `norm_eps` 1e-6 and are float16; Llama 2-Chat's may have that
    `norm_eps` too, but are bfloat16.
    """
    contexts = {p.max_seq_len for p in PRESETS.values() if _same_but(config, p, *_ASIDE)}
    if len(contexts) == 1:
        return contexts.pop()
    if config.rope_scaling:
        return 131_072
    if _is_llama3(config):
        return 8192
    if config.rope_theta == 1_000_000.0:
        return 16_384
    return 2048 if config.norm_eps == 1e-6 and dtype == np.float16 else 4096


def _same_but(a: LlamaConfig, b: LlamaConfig, *fields: str) -> bool:
    return dataclasses.replace(a, **{field: getattr(b, field) for field in fields}) == b


def from_config(config: LlamaConfig, dtype: np.dtype, kv_heads: int) -> dict[str, Any]:
    """What `params.json` says of a model: Meta's keys for its family, and others only where a reader needs them.

    Args:
      config: the architecture.
      dtype: of the weights.
      kv_heads: how many the files hold, more than the model's where they are repeated.

    Raises:
      InputError: Meta's code has no place for something.
    """
    if config.num_heads * config.head_dim != config.embed_dim:
        raise InputError(
            f"Meta's format has heads of embed_dim / num_heads = {config.embed_dim / config.num_heads:g} values only, "
            f'this model has head_dim {config.head_dim}; write another format'
        )
    scaling = config.rope_scaling
    if scaling and scaling.kind != 'llama3':
        raise InputError(
            f"Meta's format has no {scaling.kind} scaling of RoPE, which this model has; write another format"
        )
    if scaling and (scaling.low_freq_factor, scaling.original_max_seq_len) != (1.0, 8192):
        raise InputError(
            "Meta's format has RoPE scaling with low_freq_factor 1 and original_max_seq_len 8192 only, this model has "
            f'{scaling.low_freq_factor:g} and {scaling.original_max_seq_len}; write another format'
        )
    multiple_of, multiplier = ffn_rule(config)
    values: dict[str, Any] = {
        'dim': config.embed_dim,
        'n_layers': config.num_layers,
        'n_heads': config.num_heads,
        'n_kv_heads': kv_heads if kv_heads != config.num_heads or _is_llama3(config) else None,
        'vocab_size': config.vocab_size,
        'multiple_of': multiple_of,
        'ffn_dim_multiplier': multiplier,
        'norm_eps': config.norm_eps,
        'rope_theta': config.rope_theta if config.rope_theta != 10_000.0 else None,
        'use_scaled_rope': True if scaling else None,
    }
    if scaling and {scaling.factor, _scaling_factor(config)} != {8.0}:  # 8 is what Meta's code would take
        values['rope_scaling_factor'] = scaling.factor
    if scaling and scaling.high_freq_factor != 4:
        values['rope_high_freq_factor'] = scaling.high_freq_factor
    values = {key: value for key, value in values.items() if value is not None}
    params = dataclasses.replace(parse_params(values, ''), n_kv_heads=config.num_kv_heads)
    read = to_config(params, vocab_size=config.vocab_size, tied=config.tie_embeddings, dtype=dtype)
    if read.max_seq_len != config.max_seq_len:
        values['max_seq_len'] = config.max_seq_len
    return values


def _is_llama3(config: LlamaConfig) -> bool:
    return config.rope_theta == 500_000.0


def ffn_rule(config: LlamaConfig) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` by which Meta's rule gives the FFN size; Meta's own where it has some."""
    dim, size = config.embed_dim, config.mlp_dim
    if (dim, size) in _RELEASED:
        return _RELEASED[dim, size]
    # From Code Llama and Llama 2 34B on, Meta's files have a multiplier even where it is 1.
    plain = 1.0 if config.rope_theta != 10_000.0 or config.num_kv_heads != config.num_heads else None
    multiples = [256, 1024, 4096, 512, 2048, *(2**power for power in range(7, -1, -1))]
    for multiplier in (plain, *(tenths / 10 for tenths in range(1, 60))):
        for multiple_of in multiples:
            if mlp_dim(dim, multiple_of, multiplier) == size:
                return multiple_of, multiplier
    return 1, (size + 0.5) / int(2 * 4 * dim / 3)
