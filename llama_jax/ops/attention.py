"""Grouped-query attention: one front, kernels behind it.

    reference   the formula, O(T^2) memory      any platform
    chunked     plain JAX, O(T) memory          any platform
    splash      JAX's flash kernel for TPUs     TPU; elsewhere interpreted, which is for tests
    cudnn       cuDNN's flash kernel            NVIDIA GPU, bf16 or fp16
    shared_prefix  of these two, for segments that see a context too; never by 'auto'

Causal order and packed segments are part of every kernel's contract: a kernel that cannot honour segment ids must be
refused here, never left to be silently wrong.
"""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llama_jax.errors import InputError
from llama_jax.ops import attention_by_heads, attention_cudnn, attention_paged
from llama_jax.ops.attention_cached import Cached, attend_at_once, attend_by_tiles, attend_row_by_row
from llama_jax.ops.attention_chunked import chunked_attention
from llama_jax.ops.attention_reference import causal_mask, reference_attention
from llama_jax.ops.attention_splash import splash_attention
from llama_jax.ops.context_parallel import ContextShard, context_shard
from llama_jax.ops.quantized import QuantizedArray
from llama_jax.partitioning import Partitioner
from llama_jax.runtime import log_once

IMPLEMENTATIONS = ('auto', 'reference', 'chunked', 'splash', 'cudnn', 'shared_prefix')

# Queries and keys of a tile of `chunked`: a CPU's caches hold this, other devices want larger products.
_CPU_BLOCK, _BLOCK = 128, 512
# Half of it where a row has no more tokens than this: value and gradients take 0.5 to 0.9 of the CPU's time.
_SHORT_ROW = 512
# Of the fp32 that a CPU makes of a row's keys at a time, where they are of another type.
_CPU_TILE_BYTES = 256 << 10
# Up to so many queries behind a cache see all keys at once: a draft that is verified, a token.
_FEW_QUERIES = 16

logger = logging.getLogger(__name__)


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    *,
    q_segment_ids: Int[Array, 'B T'] | None = None,
    kv_segment_ids: Int[Array, 'B S'] | None = None,
    implementation: str = 'auto',
    partitioner: Partitioner | None = None,
) -> Float[Array, 'B T N H']:
    """softmax(q k^T / sqrt(H)) v, causal, each query head g reading the key/value head g // (N / K).

    Args:
      q: rotated queries.
      k: rotated keys.
      v: values.
      q_segment_ids: document of each query; a query sees keys of its own document only. None: one document.
      kv_segment_ids: document of each key; given with `q_segment_ids`.
      implementation: one of `IMPLEMENTATIONS`; 'auto' takes the best for the platform and shapes. `reference` serves
        for a single token.
      partitioner: how the arguments are split over devices. Where rows are split (mesh axis `context`) all of them
        are in balanced order (`ops.context_parallel`).

    Returns:
      The attended values in the dtype of `q`; the softmax itself is fp32. Remat policies know them by the name
      'attention_output'.

    Raises:
      InputError: the implementation is unknown, or cannot do what is asked of it.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f'unknown attention implementation {implementation!r}; choose from {IMPLEMENTATIONS}'
        )
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError('q_segment_ids and kv_segment_ids are given together or not at all')
    if q.shape[1] != k.shape[1] or q.shape[1] == 1:
        mask = causal_mask(q.shape[1], k.shape[1])
        if q_segment_ids is not None and kv_segment_ids is not None:
            mask = mask & (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])
        return checkpoint_name(reference_attention(q, k, v, mask), 'attention_output')
    kernel = choose(q, k, q_segment_ids is not None, implementation, partitioner)
    # The compiler splits the plain formula by itself, but for rows.
    if (
        partitioner is not None
        and partitioner.mesh.size > 1
        and (kernel != 'reference' or context_shard(partitioner))
    ):
        return _split_attention(q, k, v, q_segment_ids, kv_segment_ids, kernel, partitioner)
    return _attend(q, k, v, q_segment_ids, kv_segment_ids, kernel, None, platform_of(partitioner))


def first_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    implementation: str = 'auto',
    partitioner: Partitioner | None = None,
) -> Float[Array, 'B T N H']:
    """As `attention`, of rows of one document, and without gradients: a CPU has a kernel of its own for long ones."""
    alone = partitioner is None or partitioner.mesh.size == 1
    is_cpu = alone and platform_of(partitioner) == 'cpu'
    if implementation == 'auto' and is_cpu and attention_by_heads.serves(q.shape[1]):
        return attention_by_heads.attend_by_heads(q, k, v)
    return attention(q, k, v, implementation=implementation, partitioner=partitioner)


def cached_attention(
    q: Float[Array, 'B T N H'],
    keys: Cached,
    values: Cached,
    start: Int[Array, 'B'],
    partitioner: Partitioner | None = None,
) -> Float[Array, 'B T N H']:
    """As `attention`, of queries behind others whose keys and values are in a cache, as those of the queries are too.

    Args:
      q: rotated queries; row b's stand at slots start[b], start[b] + 1, ...
      keys: rotated keys, heads first, slot after slot; what lies behind a query is not seen.
      values: as the keys.
      start: tokens that each row had read before.
      partitioner: how the arguments are split over devices.
    """
    platform = platform_of(partitioner)
    is_fp32 = not isinstance(keys, QuantizedArray) and keys.dtype == jnp.float32
    # A CPU multiplies in fp32 alone: of other types it would make an fp32 copy, so does it tile by tile in its caches.
    if q.dtype != jnp.float32 and (is_fp32 or platform == 'cpu'):
        wide = cached_attention(q.astype(jnp.float32), keys, values, start, partitioner)
        return wide.astype(q.dtype)
    if q.shape[1] > _FEW_QUERIES:
        block = _CPU_BLOCK if platform == 'cpu' else _BLOCK
        attend = functools.partial(attend_by_tiles, max_block=block)
    elif platform == 'cpu' and not is_fp32:
        attend = functools.partial(attend_row_by_row, max_bytes=_CPU_TILE_BYTES)
    else:
        return attend_at_once(q, keys, values, start)
    if partitioner is None or partitioner.mesh.size == 1:
        if (
            platform == 'cpu'
            and is_fp32
            and attention_by_heads.serves_behind(q.shape[0], q.shape[1], keys.shape[2])
        ):
            return attention_by_heads.attend_behind(q, keys, values, start, attend)
        return attend(q, keys, values, start)
    q_spec = partitioner.spec(('batch', None, 'heads', 'head_dim'), q.shape, 'queries')
    kv_spec = partitioner.spec(('batch', 'kv_heads', None, None), keys.shape, 'cached keys')
    head_axes, head_parts = _axes_and_parts(q_spec[2], partitioner)
    repeated = kv_spec[1] != q_spec[2]

    def attend_own(q, keys, values, start):
        if repeated:
            keys, values = jax.tree.map(
                lambda x: _own_kv_heads(x, q.shape[2] * head_parts, head_axes, head_parts, axis=1),
                (keys, values),
            )
        return attend(q, keys, values, start)

    if repeated:
        kv_spec = PartitionSpec(kv_spec[0], None, *kv_spec[2:])
    return jax.shard_map(
        attend_own,
        mesh=partitioner.mesh,
        in_specs=(q_spec, kv_spec, kv_spec, partitioner.spec(('batch',), start.shape, 'lengths')),
        out_specs=q_spec,
        check_vma=False,
    )(q, keys, values, start)


def paged_cached_attention(
    q: Float[Array, 'B T N H'],
    pages: Float[Array, 'B S KV H'],
    start: Int[Array, 'B'],
    partitioner: Partitioner | None = None,
) -> Float[Array, 'B T N H']:
    """As `cached_attention`, of a cache of pages, where `cache_layout` says that it can be of such."""
    if partitioner is None:
        return attention_paged.paged_attention(q, pages, start)
    q_spec = partitioner.spec(('batch', None, 'heads', 'head_dim'), q.shape, 'queries')
    pages_spec = partitioner.spec(('batch', None, 'kv_heads', 'head_dim'), pages.shape, 'pages')
    start_spec = partitioner.spec(('batch',), start.shape, 'lengths')
    return jax.shard_map(
        attention_paged.paged_attention,
        mesh=partitioner.mesh,
        in_specs=(q_spec, pages_spec, start_spec),
        out_specs=q_spec,
        check_vma=False,
    )(q, pages, start)


def cache_layout(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    partitioner: Partitioner | None = None,
) -> str:
    """How keys and values of such heads are kept: in 'pages' where a TPU's kernel can read them, else 'heads first'.

    What keeps pages from a TPU is logged, once in a process.
    """
    if platform_of(partitioner) != 'tpu':
        return 'heads first'
    rules = {} if partitioner is None else dict(partitioner.rules)
    reason = 'heads of keys are split otherwise than those of queries'
    if rules.get('heads') == rules.get('kv_heads'):
        parts = 1 if partitioner is None else partitioner.axis_size('heads')
        reason = attention_paged.unsupported(num_heads, num_kv_heads, head_dim, dtype, parts)
    if reason is None:
        return 'pages'
    log_once(logger, logging.INFO, f'cache: heads first, not in pages: {reason}')
    return 'heads first'


def choose(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    packed: bool,
    implementation: str = 'auto',
    partitioner: Partitioner | None = None,
) -> str:
    """The kernel that serves self-attention of these shapes; logged, each choice once in a process.

    Raises:
      InputError: `implementation` names one that cannot.
    """
    platform = platform_of(partitioner)
    shard = context_shard(partitioner)
    batch_parts = 1 if partitioner is None else partitioner.axis_size('batch')

    def reason_against(kernel: str) -> str | None:
        if kernel == 'splash' and shard is not None and q.shape[1] % (2 * 128 * shard.size):
            return f'a row of {q.shape[1]} tokens does not divide into chunks of 128 on {shard.size} devices'
        if kernel == 'shared_prefix' and (not packed or shard is not None):
            return 'it needs segment ids, and rows that are whole on a device (mesh axis context=1)'
        if kernel == 'cudnn':
            if platform != 'gpu' or 'cuda' not in jax.devices('gpu')[0].client.platform_version:
                return f'it needs an NVIDIA GPU, and this is a {platform}'
            if shard is not None:
                return 'it cannot attend with a part of a row (mesh axis context)'
            return attention_cudnn.unsupported(q, k, packed, max(1, q.shape[0] // batch_parts))
        return None

    best = {'tpu': 'splash', 'gpu': 'cudnn'}.get(platform, 'chunked')
    kernel = best if implementation == 'auto' else implementation
    reason = reason_against(kernel)
    if reason and implementation != 'auto':
        raise InputError(
            f'attention implementation {implementation!r} cannot be used: {reason}; choose auto or chunked'
        )
    if reason:
        log_once(logger, logging.INFO, f'attention: chunked, not {best}: {reason}')
        return 'chunked'
    log_once(
        logger,
        logging.INFO,
        f'attention: {kernel} ({platform}{"" if implementation == "auto" else ", as asked for"})',
    )
    return kernel


def platform_of(partitioner: Partitioner | None) -> str:
    """Of the mesh, which may be one that is only compiled for."""
    return jax.default_backend() if partitioner is None else partitioner.mesh.devices.flat[0].platform


def _attend(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    kernel: str,
    shard: ContextShard | None,
    platform: str,
) -> Array:
    """One kernel on what one device holds; the keys are those of whole rows."""
    starts = None if shard is None else shard.chunk_starts(k.shape[1])
    # These two name their residuals themselves, so that with the output saved nothing of them is computed twice; those
    # of cuDNN, which have no name, remat policies know by their primitive.
    if kernel == 'splash':
        return splash_attention(
            q, k, v, q_segment_ids, kv_segment_ids, shard, interpret=platform != 'tpu'
        )  # fmt: skip
    if kernel in ('chunked', 'shared_prefix'):
        block = _BLOCK
        if platform == 'cpu':
            block = _CPU_BLOCK if q.shape[1] > _SHORT_ROW else _CPU_BLOCK // 2
        return chunked_attention(
            q, k, v, q_segment_ids, kv_segment_ids, starts, block, sees_context=kernel == 'shared_prefix'
        )
    if kernel == 'reference':
        mask = causal_mask(q.shape[1], k.shape[1])
        if starts is not None:
            q_slots = (starts[:, None] + jnp.arange(q.shape[1] // 2)[None, :]).reshape(-1)
            mask = (q_slots[:, None] >= jnp.arange(k.shape[1])[None, :])[None]
        if q_segment_ids is not None and kv_segment_ids is not None:
            mask = mask & (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])
        return checkpoint_name(reference_attention(q, k, v, mask), 'attention_output')
    return attention_cudnn.cudnn_attention(q, k, v, q_segment_ids)


def _split_attention(q, k, v, q_segment_ids, kv_segment_ids, kernel, partitioner) -> Array:
    """`_attend` on every device, with its rows and heads; keys and values of split rows are gathered first."""
    shard = context_shard(partitioner)
    q_spec = partitioner.spec(('batch', 'length', 'heads', 'head_dim'), q.shape, 'queries')
    kv_spec = partitioner.spec(('batch', 'length', 'kv_heads', 'head_dim'), k.shape, 'keys')
    ids_spec = partitioner.spec(('batch', 'length'), q.shape[:2], 'segment ids')
    head_axes, head_parts = _axes_and_parts(q_spec[2], partitioner)
    repeated = kv_spec[2] != q_spec[2]
    if repeated:
        kv_spec = PartitionSpec(*kv_spec[:2], None, kv_spec[3])

    def attend(q, k, v, q_segment_ids, kv_segment_ids):
        if repeated:
            k, v = (_own_kv_heads(x, q.shape[2] * head_parts, head_axes, head_parts) for x in (k, v))
        if shard is not None:
            k, v = shard.gather(k), shard.gather(v)
            kv_segment_ids = None if kv_segment_ids is None else shard.gather(kv_segment_ids)
        return _attend(q, k, v, q_segment_ids, kv_segment_ids, kernel, shard, platform_of(partitioner))

    return jax.shard_map(
        attend,
        mesh=partitioner.mesh,
        in_specs=(q_spec, kv_spec, kv_spec, ids_spec, ids_spec),
        out_specs=q_spec,
        check_vma=False,
    )(q, k, v, q_segment_ids, kv_segment_ids)


def _axes_and_parts(entry: Any, partitioner: Partitioner) -> tuple[tuple[str, ...], int]:
    """The mesh axes of a dimension, and the parts that they make of it."""
    axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return axes, math.prod(partitioner.mesh.shape[axis] for axis in axes)


def _own_kv_heads(x: Array, num_heads: int, axes: tuple[str, ...], parts: int, axis: int = 2) -> Array:
    """Of key/value heads that every device has, those that its own query heads read."""
    group, local = num_heads // x.shape[axis], num_heads // parts
    first = jax.lax.axis_index(axes) * local
    if local % group == 0 or group % local == 0:
        return jax.lax.dynamic_slice_in_dim(x, first // group, max(1, local // group), axis)
    return jnp.take(x, (first + jnp.arange(local)) // group, axis)  # one for each query head
