"""What fixes a Llama's architecture: the numbers a checkpoint is meaningless without."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from llama_jax.errors import InputError
from llama_jax.table import html_of

# The largest of each field: many times those of any Llama, and small enough that no product of two overflows memory
# before somebody compares it with what a file holds.
_MOST = {
    'vocab_size': 2**24, 'embed_dim': 2**20, 'mlp_dim': 2**31 - 1, 'num_layers': 2**14, 'num_heads': 2**14,
    'num_kv_heads': 2**14, 'head_dim': 2**14, 'max_seq_len': 2**31 - 1, 'original_max_seq_len': 2**31 - 1,
    'norm_eps': 1, 'rope_theta': 1e12, 'factor': 1e6, 'low_freq_factor': 1e6, 'high_freq_factor': 1e6,
    'attention_factor': 1e3, 'beta_fast': 1e6, 'beta_slow': 1e6,
}  # fmt: skip

_KINDS = ('llama3', 'linear', 'dynamic', 'yarn')
_LLAMA3_FIELDS = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_seq_len')


def _check_ranges(kind: type, values: Mapping[str, Any]) -> None:
    """Every number of a dataclass is of its field's type, positive and within `_MOST`."""
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        value = values[field.name]
        kinds: tuple[Any, ...] = get_args(field.type) or (field.type,)
        if not isinstance(value, kinds) and not (field.type is float and type(value) is int):
            allowed = ' or '.join(getattr(kind, '__name__', str(kind)) for kind in kinds)
            raise InputError(f'{field.name} is {_shown(value)}, which is no {allowed}')
        if field.type is int and (isinstance(value, bool) or value < 1):
            raise InputError(f'{field.name} is {_shown(value)}; it must be at least 1')
        if field.name in _MOST and not 0 < value <= _MOST[field.name]:  # NaN is in no range
            raise InputError(
                f'{field.name} is {_shown(value)}; it must be above 0, at most {_MOST[field.name]:.12g}'
            )


def _shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # a number of thousands of digits
        return 'a huge number'


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched to a longer context (see `ops.rope.inverse_frequencies`).

    Attributes:
      factor: how much the lowest frequencies are slowed down: 8 for 3.1 and 3.3, 32 for 3.2's 1B and 3B.
      low_freq_factor: wavelengths above `original_max_seq_len / low_freq_factor` are slowed down by `factor`.
      high_freq_factor: wavelengths below `original_max_seq_len / high_freq_factor` stay as they are.
      original_max_seq_len: context in tokens before the stretch.
      kind: 'llama3', as Meta's since 3.1; 'linear', every frequency by the factor; 'yarn', by Peng et al. 2023;
        'dynamic', of which a context within the original one sees nothing.
      attention_factor: that yarn multiplies cosines and sines by.
      beta_fast: rotations within the original context above which yarn leaves a frequency as it is.
      beta_slow: rotations below which it is slowed down by the whole factor.
      truncate: whether yarn rounds the pairs between which it blends.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    kind: str = 'llama3'
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        _check_ranges(type(self), vars(self))
        if self.kind not in _KINDS:
            raise InputError(
                f'kind of rope_scaling is {_shown(self.kind)}; it must be one of {", ".join(_KINDS)}'
            )
        if self.kind == 'yarn' and self.beta_slow >= self.beta_fast:
            raise InputError(f'beta_slow {self.beta_slow} must be less than beta_fast {self.beta_fast}')
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f'low_freq_factor {self.low_freq_factor} must be less than high_freq_factor {self.high_freq_factor}'
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one Llama; a field `x_dim` or `num_x` is the size of the logical axis `x`.

    With `scalar_head` it is a reward model: the head gives a score in the place of the next token's logits.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    scalar_head: bool = False

    def __post_init__(self):
        _check_ranges(type(self), vars(self))
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f'num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; '
                'each key/value head serves a whole group of query heads'
            )
        if self.head_dim % 2:
            raise InputError(f'head_dim {self.head_dim} is odd; RoPE rotates pairs, so it must be even')

    def _repr_html_(self) -> str:
        return html_of('LlamaConfig', {**dataclasses.asdict(self), 'parameters': f'{self.num_params:,}'})

    @property
    def num_block_params(self) -> int:
        """Weights of all the layers together, without embedding, final norm and head."""
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim)

    @property
    def num_params(self) -> int:
        """All weights; a tied embedding counts once."""
        table = self.vocab_size * self.embed_dim
        head = self.embed_dim if self.scalar_head else 0 if self.tie_embeddings else table
        return self.num_block_params + self.embed_dim + table + head

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        if not self.scalar_head:  # as before there were others
            del values['scalar_head']
        if self.rope_scaling and self.rope_scaling.kind == 'llama3':  # as before there were others
            values['rope_scaling'] = {name: values['rope_scaling'][name] for name in _LLAMA3_FIELDS}
        return values

    @classmethod
    def from_dict(cls, values: Any) -> 'LlamaConfig':
        """What `to_dict` gave, once written and read by somebody.

        Raises:
          InputError: a field is missing, unknown, of another type or out of range; it is named.
        """
        values = _fields(cls, values, 'the configuration')
        if (scaling := values.get('rope_scaling')) is not None:
            fields = _fields(RopeScaling, scaling, 'rope_scaling')
            _check_ranges(RopeScaling, fields)
            values = {**values, 'rope_scaling': RopeScaling(**fields)}
        _check_ranges(cls, values)
        return cls(**values)


def _fields(kind: type, values: Any, what: str) -> dict[str, Any]:
    """The values, whose names are those that a dataclass of this kind takes."""
    if not isinstance(values, dict):
        raise InputError(f'{what} is a {type(values).__name__}, it must be an object')
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    if missing := [name for name, is_needed in known.items() if is_needed and name not in values]:
        raise InputError(f'{what} has no {missing[0]}')
    if unknown := [name for name in values if name not in known]:
        raise InputError(f'{what} has {_shown(unknown[0])}, which is none of {", ".join(known)}')
    return values
