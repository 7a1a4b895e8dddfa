"""Attention of new tokens to those in pages as well, by JAX's kernel for TPUs; no gradients.

A page holds some tokens of one row, the key of each head before its value; those of a row lie one after the other. The
kernel (ragged paged attention, `jax.experimental.pallas.ops.tpu`) reads the pages that hold a row's tokens and no
others, whatever room there is, and never has all scores at once; tokens, drafts and pieces of prompts are one to it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Tokens of a page, as far as they divide a row's room: a transfer of tens of KiB, and at most so many read in vain.
_PAGE_TOKENS = 128
# Of keys and values that are fetched while others are computed with, both together; a TPU v5e gives a program 16 MiB.
_BUFFER_BYTES = 4 << 20
# Tokens of a block of keys at most, so that its scores are few; and queries of one.
_MAX_KEYS, _MAX_QUERIES = 2048, 32


def unsupported(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike, parts: int = 1
) -> str | None:
    """Why the kernel cannot attend with such keys and values, or None where it can.

    Args:
      num_heads: of queries.
      num_kv_heads: of keys.
      head_dim: of both.
      dtype: of the computation and of what is kept.
      parts: devices that heads are split over.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f'pages hold bfloat16, not {jnp.dtype(dtype)}'
    if head_dim % 128:
        return f'head_dim {head_dim} is not a multiple of 128'
    if num_heads % parts or num_kv_heads % parts:
        return f'{num_kv_heads} heads of keys do not divide over {parts} devices'
    # A key and a value of bfloat16 are 32 bits, of which tiles of the chip's memory have 8 rows.
    if (own := num_kv_heads // parts) not in (1, 2, 4) and own % 8:
        return f'{own} heads of keys on a device are none of 1, 2, 4 and the multiples of 8'
    return None


def as_pages(k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H']) -> Float[Array, 'B T KV H']:
    """Keys and values as pages hold them."""
    return jnp.stack([k, v], axis=3).reshape(*k.shape[:2], -1, k.shape[3])


def paged_attention(
    q: Float[Array, 'B T N H'], pages: Float[Array, 'B S KV H'], start: Int[Array, 'B']
) -> Float[Array, 'B T N H']:
    """Causal attention to the tokens of the row before, and to those of the queries.

    Args:
      q: rotated queries; row b's stand at tokens start[b], start[b] + 1, ...
      pages: keys, rotated, and values of every row's tokens, those of the queries too.
      start: tokens that each row had read before.
    """
    # Slow to import, and only a TPU needs them.
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as kernel

    batch, length, num_heads, head_dim = q.shape
    room = pages.shape[1]
    page = math.gcd(_PAGE_TOKENS, room)
    in_row = room // page
    # A row that has ended may be full, and what its query finds is not read.
    has = jnp.minimum(start + length, room).astype(jnp.int32)
    # In the main memory, from where the kernel takes what it needs: XLA would fetch all of them, where they fit.
    in_pages = pages.reshape(batch * in_row, page, *pages.shape[2:])
    out = kernel.ragged_paged_attention(
        q.reshape(batch * length, num_heads, head_dim),
        pltpu.with_memory_space_constraint(in_pages, pltpu.HBM),
        has,
        jnp.arange(batch * in_row, dtype=jnp.int32).reshape(batch, in_row),
        jnp.arange(batch + 1, dtype=jnp.int32) * length,
        jnp.array([batch], jnp.int32),
        sm_scale=head_dim**-0.5,
        # The kernel's own table of sizes asks the chip at hand, which may be none of those that are compiled for.
        num_kv_pages_per_block=max(1, min(in_row, _block_tokens(pages) // page)),
        num_queries_per_block=min(_MAX_QUERIES, batch * length),
    )
    return out.reshape(q.shape)


def _block_tokens(pages: Any) -> int:
    """Keys that are computed with at once; heads come as many at a time as fill a tile, where they do."""
    in_tile = 8 * 4 // pages.dtype.itemsize
    heads = in_tile if pages.shape[2] % in_tile == 0 else pages.shape[2]
    return min(_MAX_KEYS, _BUFFER_BYTES // (2 * heads * pages.shape[3] * pages.dtype.itemsize))
