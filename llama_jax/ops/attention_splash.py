"""Splash attention, JAX's TPU kernel: flash attention that skips the blocks which the causal mask leaves empty.

It knows grouped heads and segment ids. It wants rows of whole blocks, and queries that are already scaled.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.ops.context_parallel import ContextShard, balanced_order

_LANES = 128  # of a TPU's vector unit: every block is a multiple


def splash_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    q_segment_ids: Int[Array, 'B T'] | None = None,
    kv_segment_ids: Int[Array, 'B S'] | None = None,
    shard: ContextShard | None = None,
    interpret: bool = False,
) -> Float[Array, 'B T N H']:
    """Causal self-attention.

    Args:
      q: rotated queries; all of the row, or one device's in balanced order.
      k: rotated keys of the whole row.
      v: values.
      q_segment_ids: document of each query; a query sees keys of its own document only.
      kv_segment_ids: document of each key.
      shard: which part of the row the queries are; T must then be a multiple of 128. None: all of it.
      interpret: run by JAX on any platform instead of compiled for a TPU; for tests.

    Returns:
      The attended values, named 'attention_output' for remat policies, as is the log-normaliser.
    """
    length, num_heads, head_dim = q.shape[1:]
    num_shards = 1 if shard is None else shard.size
    # Padding stands at the end, where no query but a padding one sees it.
    padding = -length % _LANES
    if padding and shard is not None:
        raise ValueError(f'{length} tokens on a device are not a multiple of {_LANES}')
    q, k, v = (_pad(x, padding, 'constant') for x in (q, k, v))
    kernel = _kernel(length + padding, num_heads, num_shards, interpret)
    if shard is not None:
        kernel = _part_of(kernel, shard)
    segments = None
    if q_segment_ids is not None and kv_segment_ids is not None:
        segments = _module().SegmentIds(
            *(_pad(ids, padding, 'edge') for ids in (q_segment_ids, kv_segment_ids))
        )
    # Scaled in fp32: H^-1/2 is not a power of two for every H, and a bf16 product would round once more.
    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.vmap(kernel)(*heads_first, segments)
    return out.transpose(0, 2, 1, 3)[:, :length]


def block_sizes(length: int, num_keys: int) -> Any:
    """Tiles for a device's `length` queries and all keys: large ones amortise a tile's cost, and must divide both.

    The fused backward kernel computes the scores once instead of twice, but holds one query gradient for every block
    of keys, so it is for rows of a few blocks only.
    """
    q_block = math.gcd(length, 1024)
    k_block = math.gcd(num_keys, 1024)
    compute = math.gcd(k_block, 512)
    fused = num_keys <= 4 * k_block
    split = {} if fused else {'block_q_dq': q_block, 'block_kv_dq': k_block}
    return _module().BlockSizes(
        block_q=q_block, block_kv=k_block, block_kv_compute=compute,
        block_q_dkv=q_block, block_kv_dkv=k_block, block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=fused, **split,
    )  # fmt: skip


def _module() -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import, and only a TPU needs it

    return splash_attention


def _kernel(length: int, num_heads: int, num_shards: int, interpret: bool) -> Any:
    """The kernel of `num_shards` devices with `length` queries each, with its tables of blocks."""
    splash = _module()
    total = length * num_shards
    order = balanced_order(total, num_shards) if num_shards > 1 else np.arange(total)

    class Mask(splash.CausalMask):
        """Causal for queries in balanced order, and quick to say so of a block that lies wholly on one side."""

        __hash__, __eq__ = object.__hash__, object.__eq__

        def __getitem__(self, index):
            rows = order[index[0]]
            columns = range(total)[index[1]]
            if rows[0] >= columns[-1] or rows[-1] < columns[0]:
                # It is asked for any() and all() alone: of 131,072 tokens' blocks at full size, that takes 10 s.
                return np.full((1, 1), rows[0] >= columns[-1])
            return super().__getitem__(index)

    mask = Mask((total, total))
    mask.q_sequence = order.astype(np.int32)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=block_sizes(length, total),
        head_shards=1,
        q_seq_shards=num_shards,
        residual_checkpoint_name='attention_output',
        interpret=interpret,
    )


def _part_of(kernel: Any, shard: ContextShard) -> Any:
    """The tables of this device: all of them have the query blocks second, but for the queries' own slots."""

    def part(table: Array) -> Array:
        axis = 0 if table.ndim == 1 else 1
        size = table.shape[axis] // shard.size
        return jax.lax.dynamic_slice_in_dim(table, shard.rank() * size, size, axis)

    return jax.tree.map(part, kernel)


def _pad(x: Array, padding: int, mode: str) -> Array:
    if not padding:
        return x
    return jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)], mode=mode)  # pyright: ignore[reportArgumentType]
