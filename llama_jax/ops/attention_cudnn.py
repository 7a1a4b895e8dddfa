"""cuDNN's flash attention through JAX, on NVIDIA GPUs.

Documents of packed rows become rows of their own inside the kernel, which then computes no score across them: as fast
as without segment ids, or faster. That binding is not part of JAX's public face; where a release lacks it, on GPUs
before Hopper, and for rows of more documents than there is room for, segment ids become a mask, at half the speed, and
where that is too large `chunked` serves.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.ops.attention_chunked import chunked_attention

# A mask is handed to the kernel as 2 T^2 bytes a row: rows of a few thousand tokens can afford that, and this is most.
_MAX_MASK_BYTES = 1 << 30
# Of the fp32 sums that the backward pass takes for each document as if it were as long as a row. Time grows with the
# number of documents too, however short they are: 1.0 ms with 16, 1.4 with 32, 2.1 with 64 (2 x 4,096, 32 heads, H200).
_MAX_WORKSPACE_BYTES = 4 << 30
_MAX_DOCUMENTS = 16
# Of the primitive whose results are the output and the softmax's residual.
FORWARD_PRIMITIVE = 'dot_product_attention_fwd_wrapper'


def unsupported(
    q: Array | jax.ShapeDtypeStruct, k: Array | jax.ShapeDtypeStruct, packed: bool, local_batch: int
) -> str | None:
    """Why cuDNN cannot attend with these, or None where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f'it computes in bfloat16 or float16, not {q.dtype}'
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f'head_dim {q.shape[-1]} is not a multiple of 8 up to 128'
    if packed and not attends_by_document():
        if q.shape[1] % 2:
            return f'with segment ids it needs an even number of tokens, not {q.shape[1]}'
        num_bytes = mask_bytes(q, k, local_batch)
        if num_bytes > _MAX_MASK_BYTES:
            return (
                f'it honours segment ids only as a mask of {num_bytes / 2**30:.1f} GiB a device, over the limit of '
                f'{_MAX_MASK_BYTES / 2**30:.0f}'
            )
    return None


def mask_bytes(q: Array | jax.ShapeDtypeStruct, k: Array | jax.ShapeDtypeStruct, batch: int) -> int:
    """Of the mask that segment ids of so many rows become."""
    return 2 * batch * q.shape[1] * k.shape[1]


def attends_by_document() -> bool:
    """Whether this JAX and the GPU at hand can attend within the documents of a row."""
    try:
        parameters = inspect.signature(_by_document()[0]).parameters
    except (ImportError, AttributeError):
        return False
    if not {'q_seqlen', 'kv_seqlen', 'q_offsets', 'kv_offsets', 'mask_type'} <= set(parameters):
        return False
    capability = getattr(jax.devices('gpu')[0], 'compute_capability', '0.0')
    return int(capability.partition('.')[0]) >= 9


def _by_document() -> tuple[Any, Any]:
    """JAX's binding that takes documents, and the causal mask within each."""
    from jax._src.cudnn import fused_attention_stablehlo as binding

    return binding.dot_product_attention, binding.MaskType.PADDING_CAUSAL


def cudnn_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    segment_ids: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T N H']:
    """Causal self-attention; with segment ids within each document."""
    if segment_ids is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')
    if not attends_by_document():
        return masked_attention(q, k, v, segment_ids)

    def by_document(q, k, v):
        attend, mask_type = _by_document()
        sizes = dict(q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts)
        return attend(q, k, v, **sizes, scale=q.shape[-1] ** -0.5, mask_type=mask_type)

    def any_documents(q, k, v):
        if q.shape[1] % 2 == 0 and mask_bytes(q, k, q.shape[0]) <= _MAX_MASK_BYTES:
            return masked_attention(q, k, v, segment_ids)
        return chunked_attention(q, k, v, segment_ids, segment_ids)

    if (limit := max_documents(q, k)) < 2:
        return any_documents(q, k, v)
    lengths, starts, fits = documents(segment_ids, limit)
    return jax.lax.cond(fits, by_document, any_documents, q, k, v)


def max_documents(q: Array | jax.ShapeDtypeStruct, k: Array | jax.ShapeDtypeStruct) -> int:
    """So many of each row [B, T, heads, H] are attended to apart: what there is memory for, at most some."""
    bytes_per_value = (
        4 if q.shape[2] == k.shape[2] else 8
    )  # of shared heads also what each query head teaches them
    return min(_MAX_WORKSPACE_BYTES // (bytes_per_value * q.size), _MAX_DOCUMENTS)


def masked_attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    segment_ids: Int[Array, 'B T'],
    implementation: str = 'cudnn',
) -> Float[Array, 'B T N H']:
    """Segments as a mask [B, 1, T, T], which the kernel adds to the scores of every head."""
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    kernel: Any = implementation
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=kernel)


def documents(
    segment_ids: Int[Array, 'B T'], limit: int
) -> tuple[Int[Array, 'B M'], Int[Array, 'B M_plus_1'], Bool[Array, '']]:
    """Lengths and starts of a row's documents, -1 behind the last, and whether they tell all there is.

    They do not where a row has more than `limit`, or where a document stands in several pieces: ids must not
    fall, but to the padding's 0.
    """
    batch, length = segment_ids.shape
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_start = jnp.concatenate([jnp.ones((batch, 1), bool), changes], axis=1)
    places = jnp.where(is_start, jnp.arange(length, dtype=jnp.int32), length)
    # One more than there is room for: the end of the last.
    starts = jnp.sort(places, axis=1)[:, : limit + 1]
    starts = jnp.pad(starts, ((0, 0), (0, limit + 1 - starts.shape[1])), constant_values=length)
    lengths = jnp.where(starts[:, :-1] < length, starts[:, 1:] - starts[:, :-1], -1)
    order = jnp.where(segment_ids == 0, jnp.iinfo(jnp.int32).max, segment_ids)
    fits = jnp.all(starts[:, -1] == length) & jnp.all(order[:, 1:] >= order[:, :-1])
    return lengths, jnp.where(starts < length, starts, -1), fits
