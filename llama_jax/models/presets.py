"""Every released text Llama, and the small ones that train on a laptop.

Sources: LLaMA paper Table 2, Llama 2 paper Table 1, Llama 3 paper Table 3, and the `params.json` that Meta ships.
`norm_eps` is not uniform: LLaMA 1 uses 1e-6 but for 65B. Llama 2 34B was never released: its row is Code Llama 34B's.
"""

import dataclasses
from typing import Any

from llama_jax.errors import InputError, did_you_mean
from llama_jax.models.config import LlamaConfig, RopeScaling

_7B: dict[str, Any] = dict(
    embed_dim=4096, mlp_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128
)
_13B: dict[str, Any] = dict(
    embed_dim=5120, mlp_dim=13824, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128
)
_33B: dict[str, Any] = dict(
    embed_dim=6656, mlp_dim=17920, num_layers=60, num_heads=52, num_kv_heads=52, head_dim=128
)
_65B: dict[str, Any] = dict(
    embed_dim=8192, mlp_dim=22016, num_layers=80, num_heads=64, num_kv_heads=64, head_dim=128
)
_34B: dict[str, Any] = dict(
    embed_dim=8192, mlp_dim=22016, num_layers=48, num_heads=64, num_kv_heads=8, head_dim=128
)
_70B: dict[str, Any] = dict(
    embed_dim=8192, mlp_dim=28672, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128
)
_8B: dict[str, Any] = dict(
    embed_dim=4096, mlp_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128
)
_405B: dict[str, Any] = dict(
    embed_dim=16384, mlp_dim=53248, num_layers=126, num_heads=128, num_kv_heads=8, head_dim=128
)
_1B: dict[str, Any] = dict(
    embed_dim=2048, mlp_dim=8192, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64
)
_3B: dict[str, Any] = dict(
    embed_dim=3072, mlp_dim=8192, num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128
)

_LLAMA_1: dict[str, Any] = dict(vocab_size=32_000, max_seq_len=2048, norm_eps=1e-6)
_LLAMA_2: dict[str, Any] = dict(vocab_size=32_000, max_seq_len=4096)
# Code Llama trains at 16,384 tokens and is used up to 100,000; 7B and 13B have four infilling tokens, padded to 16.
_CODE: dict[str, Any] = dict(max_seq_len=16_384, rope_theta=1_000_000.0)
_LLAMA_3: dict[str, Any] = dict(vocab_size=128_256, max_seq_len=8192, rope_theta=500_000.0)
_LLAMA_3_1: dict[str, Any] = {**_LLAMA_3, 'max_seq_len': 131_072, 'rope_scaling': RopeScaling(factor=8.0)}
# Meta's code hard-codes factor 8; 32 is right for these two, as its maintainers confirmed (llama-models issue 241).
_LLAMA_3_2: dict[str, Any] = {**_LLAMA_3_1, 'rope_scaling': RopeScaling(factor=32.0), 'tie_embeddings': True}


class _Presets(dict[str, LlamaConfig]):
    """Architectures by name; a name that is none is refused with the nearest ones."""

    def __repr__(self) -> str:
        return f'PRESETS({", ".join(self)})'

    def __missing__(self, name: str) -> LlamaConfig:
        raise InputError(f'unknown model {name!r}; {did_you_mean(str(name), self)}')


PRESETS: dict[str, LlamaConfig] = _Presets({
    'tiny': LlamaConfig(
        vocab_size=2048,
        embed_dim=192,
        mlp_dim=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=48,
        max_seq_len=256,
        tie_embeddings=True,
    ),
    'stories_15m': LlamaConfig(
        vocab_size=32_000,
        embed_dim=288,
        mlp_dim=768,
        num_layers=6,
        num_heads=6,
        num_kv_heads=6,
        head_dim=48,
        max_seq_len=256,
        tie_embeddings=True,
    ),
    'stories_110m': LlamaConfig(
        vocab_size=32_000,
        embed_dim=768,
        mlp_dim=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        max_seq_len=1024,
        tie_embeddings=True,
    ),
    'llama_7b': LlamaConfig(**_7B, **_LLAMA_1),
    'llama_13b': LlamaConfig(**_13B, **_LLAMA_1),
    'llama_33b': LlamaConfig(**_33B, **_LLAMA_1),
    'llama_65b': LlamaConfig(**_65B, **{**_LLAMA_1, 'norm_eps': 1e-5}),
    'llama2_7b': LlamaConfig(**_7B, **_LLAMA_2),
    'llama2_13b': LlamaConfig(**_13B, **_LLAMA_2),
    'llama2_34b': LlamaConfig(**_34B, **_LLAMA_2),
    'llama2_70b': LlamaConfig(**_70B, **_LLAMA_2),
    'code_llama_7b': LlamaConfig(**_7B, **_CODE, vocab_size=32_016),
    'code_llama_13b': LlamaConfig(**_13B, **_CODE, vocab_size=32_016),
    'code_llama_34b': LlamaConfig(**_34B, **_CODE, vocab_size=32_000),
    'llama3_8b': LlamaConfig(**_8B, **_LLAMA_3),
    'llama3_70b': LlamaConfig(**_70B, **_LLAMA_3),
    'llama3_1_8b': LlamaConfig(**_8B, **_LLAMA_3_1),
    'llama3_1_70b': LlamaConfig(**_70B, **_LLAMA_3_1),
    'llama3_1_405b': LlamaConfig(**_405B, **_LLAMA_3_1),
    'llama3_2_1b': LlamaConfig(**_1B, **_LLAMA_3_2),
    'llama3_2_3b': LlamaConfig(**_3B, **_LLAMA_3_2),
    'llama3_3_70b': LlamaConfig(**_70B, **_LLAMA_3_1),
})  # fmt: skip


def with_vocab_size(config: LlamaConfig, vocab_size: int) -> LlamaConfig:
    """The same architecture over another tokenizer, as when a small model trains its own."""
    return dataclasses.replace(config, vocab_size=vocab_size)
