"""What fixes a Llama's architecture: the numbers a checkpoint is meaningless without."""

import dataclasses

from llama_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low RoPE frequencies (see `ops.rope.inverse_frequencies`).

    Attributes:
      factor: how much the lowest frequencies are slowed down: 8 for 3.1 and 3.3, 32 for 3.2's 1B and 3B.
      low_freq_factor: wavelengths above `original_max_seq_len / low_freq_factor` are slowed down by `factor`.
      high_freq_factor: wavelengths below `original_max_seq_len / high_freq_factor` stay as they are.
      original_max_seq_len: context in tokens before the stretch.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one Llama; a field `x_dim` or `num_x` is the size of the logical axis `x`."""

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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise InputError(f'{field.name} is {value}; it must be at least 1')
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f'num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; '
                'each key/value head serves a whole group of query heads'
            )
        if self.head_dim % 2:
            raise InputError(f'head_dim {self.head_dim} is odd; RoPE rotates pairs, so it must be even')

    @property
    def num_block_params(self) -> int:
        """Weights of all the layers together, without embedding, final norm and head."""
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim)

    @property
    def num_params(self) -> int:
        """All weights; a tied embedding counts once."""
        tables = self.vocab_size * self.embed_dim * (1 if self.tie_embeddings else 2)
        return self.num_block_params + self.embed_dim + tables

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> 'LlamaConfig':
        scaling = values.get('rope_scaling')
        return cls(**{**values, 'rope_scaling': RopeScaling(**scaling) if scaling else None})
