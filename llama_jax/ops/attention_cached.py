"""Attention of new tokens to those in a cache as well, whose arrays lie heads first; no gradients.

A few queries take the formula at once, which reads every key and value where it lies. Many of them, a piece of a long
prompt, go tile by tile with a running softmax (FlashAttention-2, Dao 2023, algorithm 1): no tile beyond the longest row
is visited, and memory is O(T).

Keys and values may be int8 codes with a scale for each token and head. That of a key stands behind its scores, that of
a value on the weights it is summed with, so no cache is ever made into floating point as a whole: a GPU or TPU converts
codes within the products, and a CPU, whose products take fp32 alone, a tile that stays in its caches. Codes of keys are
of keys by a Hadamard matrix, which queries are multiplied by too: it spreads the few channels that RoPE hardly turns,
which are many times larger than the rest and would leave it few codes (QuaRot, Ashkboos et al. 2024, section 4.2).
"""

import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.ops.quantized import QuantizedArray

# Keys or values of a layer: an array [B, K, S, H], or codes of that shape with scales [B, K, S, 1].
Cached: TypeAlias = Float[Array, 'B K S H'] | QuantizedArray

_TINY = float(jnp.finfo(jnp.float32).tiny)
_MASKED = float(
    jnp.finfo(jnp.float32).min
)  # finite: a padding row may see no key at all and must not become NaN


def keys_as_codes(k: Float[Array, 'B T K H']) -> QuantizedArray:
    """As int8 of a cache, a scale for each token and head."""
    return values_as_codes(_spread(k.astype(jnp.float32)))


def values_as_codes(v: Float[Array, 'B T K H']) -> QuantizedArray:
    """As int8 of a cache, a scale for each token and head.

    It is the largest value by 127, which that value is then exactly; of so few values one cut by half a step, as
    weights have it, costs more than the finer steps of all the others save.
    """
    v = v.astype(jnp.float32)
    scale = jnp.max(jnp.abs(v), axis=-1, keepdims=True) / 127
    scale = jnp.where(scale < math.sqrt(_TINY), 1, scale)
    return QuantizedArray(jnp.round(v / scale).astype(jnp.int8), scale)


def keys_of_codes(codes: QuantizedArray) -> Float[Array, 'B T K H']:
    """What codes of keys stand for, in float32."""
    return _spread(codes.materialize())


def attend_at_once(
    q: Float[Array, 'B T N H'],
    keys: Cached,
    values: Cached,
    start: Int[Array, 'B'],
) -> Float[Array, 'B T N H']:
    """The formula; it holds the scores [B, K, G, T, S] in fp32.

    Args:
      q: rotated queries; row b's stand at slots start[b], start[b] + 1, ...
      keys: rotated keys, those of the queries too.
      values: as the keys.
      start: tokens that each row had read before.
    """
    grouped = _grouped(q, keys)
    scores = _scores(grouped, keys, start, jnp.arange(keys.shape[2]))
    return _ungrouped(_attended(jax.nn.softmax(scores, axis=-1), values, q.dtype, q.dtype), q.shape)


def attend_by_tiles(
    q: Float[Array, 'B T N H'],
    keys: Cached,
    values: Cached,
    start: Int[Array, 'B'],
    max_block: int,
) -> Float[Array, 'B T N H']:
    """As `attend_at_once`, `max_block` queries with as many keys at a time."""
    return _by_tiles(q, keys, values, start, max_block, max_block, 0)


def attend_row_by_row(
    q: Float[Array, 'B T N H'], keys: Cached, values: Cached, start: Int[Array, 'B'], max_bytes: int
) -> Float[Array, 'B T N H']:
    """As `attend_at_once`, of one row after the other so many keys at a time as take `max_bytes` in fp32."""
    num_keys = max(max_bytes // (4 * keys.shape[1] * keys.shape[3]), 1)
    num_keys = 1 << (num_keys.bit_length() - 1)  # divides the slots as far as they are twos

    def attend(row):
        queries, first = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (q, start))
        return _by_tiles(queries, keys, values, first, q.shape[1], num_keys, row)[0]

    return jax.lax.map(attend, jnp.arange(q.shape[0])) if q.shape[0] > 1 else attend(0)[None]


def _by_tiles(
    q: Float[Array, 'R T N H'],
    keys: Cached,
    values: Cached,
    start: Int[Array, 'R'],
    max_block: int,
    max_keys: int,
    row: Array | int,
) -> Float[Array, 'R T N H']:
    """Of R rows, `row` the first of them in the cache."""
    length, num_slots = q.shape[1], keys.shape[2]
    block, key_block = min(max_block, length), math.gcd(max_keys, num_slots)
    num_blocks = math.ceil(length / block)
    padded = jnp.pad(q, ((0, 0), (0, num_blocks * block - length), (0, 0), (0, 0)))

    def block_of(index):
        queries = jax.lax.dynamic_slice_in_dim(padded, index * block, block, axis=1)
        queries, first = _grouped(queries, keys), start + index * block

        def visit(tile, carry):
            attended, largest, total = carry
            k, v = jax.tree.map(
                lambda x: jax.lax.dynamic_slice(
                    x, (row, 0, tile * key_block, 0), (len(q), x.shape[1], key_block, x.shape[3])
                ),
                (keys, values),
            )
            scores = _scores(queries, k, first, tile * key_block + jnp.arange(key_block))
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            # Where all seen so far is masked this is 1 rather than 0; `shrink` wipes it out with the first visible key.
            weights = jnp.exp(scores - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            product = _attended(weights, v, q.dtype, jnp.float32)
            attended = attended * shrink[..., None] + product
            return attended, new_largest, total * shrink + jnp.sum(weights, axis=-1)

        rows = queries.shape[:-1]
        carry = jnp.zeros(queries.shape), jnp.full(rows, _MASKED), jnp.zeros(rows)
        seen = jnp.minimum(jnp.max(first) + block, num_slots)
        attended, _, total = jax.lax.fori_loop(0, (seen + key_block - 1) // key_block, visit, carry)
        attended = (attended / total[..., None]).astype(q.dtype)
        return _ungrouped(attended, (q.shape[0], block, *q.shape[2:]))

    if num_blocks == 1:
        return block_of(0)
    blocks = jax.lax.map(block_of, jnp.arange(num_blocks))
    return jnp.moveaxis(blocks, 0, 1).reshape(padded.shape)[:, :length]


def _grouped(q: Float[Array, 'B T N H'], keys: Cached) -> Float[Array, 'B K G T H']:
    """Queries with those that read the same keys side by side."""
    batch, length, num_heads, head_dim = q.shape
    q = _spread(q) if isinstance(keys, QuantizedArray) else q
    num_kv_heads = keys.shape[1]
    return q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(
        0, 2, 3, 1, 4
    )


def _spread(x: Float[Array, 'B T N H']) -> Float[Array, 'B T N H']:
    """By the Hadamard matrix that is its own inverse, of heads or of their parts that are powers of two."""
    size = x.shape[-1] & -x.shape[-1]
    parts = x.reshape(*x.shape[:-1], -1, size)
    return jnp.einsum(
        '...h,hg->...g', parts, jnp.asarray(_hadamard(size), x.dtype), precision='highest'
    ).reshape(x.shape)


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def _ungrouped(out: Float[Array, 'B K G T H'], shape: tuple[int, ...]) -> Float[Array, 'B T N H']:
    return out.transpose(0, 3, 1, 2, 4).reshape(shape)


def _product(equation: str, x: Float[Array, 'B K G T _'], cache: Cached, dtype: Any) -> Array:
    """Of all queries that read the same keys with them, as one matrix: of more axes XLA for CPUs copies the cache."""
    matrix = x.reshape(*x.shape[:2], -1, x.shape[4])
    cache = cache.qvalue if isinstance(cache, QuantizedArray) else cache
    out = jnp.einsum(equation, matrix, cache.astype(x.dtype), preferred_element_type=dtype)
    return out.reshape(*x.shape[:4], -1)


def _scores(
    grouped: Float[Array, 'B K G T H'], keys: Cached, start: Int[Array, 'B'], slots: Int[Array, 'S']
) -> Float[Array, 'B K G T S']:
    """Scaled products with the keys of these slots, masked where a slot is after the query's."""
    scores = _scaled(_product('bkmh,bksh->bkms', grouped, keys, jnp.float32), keys)
    places = start[:, None] + jnp.arange(grouped.shape[3])[None, :]
    mask = places[:, :, None] >= slots[None, None, :]
    return jnp.where(mask[:, None, None], scores * grouped.shape[-1] ** -0.5, _MASKED)


def _attended(weights: Float[Array, 'B K G T S'], values: Cached, dtype: Any, output_dtype: Any) -> Array:
    """Values by their weights, multiplied in `dtype`."""
    return _product('bkms,bksh->bkmh', _scaled(weights, values).astype(dtype), values, output_dtype)


def _scaled(of_slots: Float[Array, 'B K G T S'], cache: Cached) -> Float[Array, 'B K G T S']:
    """What is of slots times their scales."""
    return of_slots * cache.scale[:, :, None, None, :, 0] if isinstance(cache, QuantizedArray) else of_slots
