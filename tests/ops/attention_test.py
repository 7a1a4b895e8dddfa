"""Attention against a loop over heads in float64: values, gradients, order of time, packed documents."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops import attention_cudnn
from llama_jax.ops.attention import attention, choose
from llama_jax.ops.attention_cudnn import cudnn_attention
from llama_jax.types import InputError

BATCH, LENGTH, HEAD_DIM = 2, 24, 16
SEGMENT_IDS = np.stack([np.repeat([1, 2, 3, 0], [5, 1, 12, 6]), np.repeat([1, 2], [20, 4])]).astype(np.int32)


def random_qkv(num_heads: int, num_kv_heads: int, num_queries: int = LENGTH) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = [(num_queries, num_heads), (LENGTH, num_kv_heads), (LENGTH, num_kv_heads)]
    return tuple(rng.normal(size=(BATCH, *shape, HEAD_DIM)).astype(np.float32) for shape in shapes)


def reference(q, k, v, mask, cotangent):
    """Attention and its gradients in float64, from the formulas: (out, dq, dk, dv)."""
    q, k, v, cotangent = (np.asarray(a, np.float64) for a in (q, k, v, cotangent))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            kv = n // (q.shape[2] // k.shape[2])
            scores = np.where(mask[b], q[b, :, n] @ k[b, :, kv].T / np.sqrt(q.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, :, n] = weights @ v[b, :, kv]
            d_weights = cotangent[b, :, n] @ v[b, :, kv].T
            d_scores = (
                weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
            )
            dq[b, :, n] = d_scores @ k[b, :, kv]
            dk[b, :, kv] += d_scores.T @ q[b, :, n]
            dv[b, :, kv] += weights.T @ cotangent[b, :, n]
    return out, dq, dk, dv


# Every pair of: heads to a key/value head, head_dim, packed or not, dtype.
CASES = [
    (8, 8, 64, True, 'float32'), (8, 8, 128, False, 'bfloat16'), (8, 2, 64, False, 'bfloat16'),
    (8, 2, 128, True, 'float32'), (8, 1, 64, True, 'bfloat16'), (8, 1, 128, False, 'float32'),
]  # fmt: skip
# No multiple of any kernel's block; documents end inside blocks.
LONG, LONG_IDS = 198, np.stack([np.repeat([1, 2, 3, 0], [70, 1, 99, 28]), np.repeat([1, 2], [130, 68])])


def run(implementation):
    """A function of q, k, v and segment ids (or None)."""
    if implementation == 'cudnn formula':  # what is handed to cuDNN, computed by XLA
        return lambda q, k, v, ids: cudnn_attention(q, k, v, ids, implementation='xla')
    return lambda q, k, v, ids: attention(
        q, k, v, q_segment_ids=ids, kv_segment_ids=ids, implementation=implementation
    )


KERNELS = ['reference', 'chunked', 'splash', 'cudnn formula']


def with_cudnn(*case):
    """cuDNN itself, where there is a GPU."""
    return pytest.param('cudnn', *case, marks=pytest.mark.accelerator)


@pytest.mark.parametrize(
    ('implementation', 'num_heads', 'num_kv_heads', 'head_dim', 'packed', 'dtype'),
    [(kernel, *case) for kernel in KERNELS for case in CASES]
    + [with_cudnn(*case) for case in CASES if case[-1] == 'bfloat16'],  # it attends in 16 bits alone
)
def test_values_and_gradients(implementation, num_heads, num_kv_heads, head_dim, packed, dtype):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, LONG, n, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    ids = jnp.asarray(LONG_IDS, jnp.int32) if packed else None

    def both(q, k, v, cotangent):
        out, vjp = jax.vjp(lambda *qkv: run(implementation)(*qkv, ids), q, k, v)
        return out, *vjp(cotangent)

    found = jax.jit(both)(q, k, v, cotangent)

    mask = np.tril(np.ones((BATCH, LONG, LONG), bool))
    if packed:
        mask &= LONG_IDS[:, :, None] == LONG_IDS[:, None, :]
    # fp32: sums of some hundred roundings of 6e-8. bf16: weights, their gradient and the result keep 8 bits (2^-9).
    tolerance = 5e-6 if dtype == 'float32' else 1e-2
    for actual, expected in zip(found, reference(q, k, v, mask, cotangent), strict=True):
        assert actual.dtype == dtype
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            np.asarray(actual, np.float64) / scale, expected / scale, atol=tolerance, rtol=0
        )


@pytest.mark.parametrize('implementation', [*KERNELS, with_cudnn()])
def test_a_packed_document_does_not_leak(implementation):
    """Document 2 neither sees document 1 nor teaches it anything; a kernel that ignores the ids is found out."""
    rng = np.random.default_rng(0)
    dtype = 'bfloat16' if implementation == 'cudnn' else 'float32'
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(1, LONG, 2, 64)), dtype) for _ in range(4))
    ids = np.repeat([1, 2], [70, LONG - 70])[None].astype(np.int32)
    first = jnp.asarray(ids == 1)[:, :, None, None]

    def leak(kernel) -> tuple[float, float]:
        """By how much the output of document 2 follows the keys and values of document 1, and the gradients back."""

        @jax.jit
        def both(k, v):
            out, vjp = jax.vjp(lambda k, v: kernel(q, k, v, jnp.asarray(ids)), k, v)
            return out, *vjp(jnp.where(first, 0, cotangent))

        out, by_k, by_v = both(k, v)
        changed, *_ = both(jnp.where(first, 5 * v, k), jnp.where(first, -3 * k, v))
        forward = jnp.where(first, 0, jnp.abs(changed - out)).max()
        return float(forward), float(jnp.where(first, jnp.abs(by_k) + jnp.abs(by_v), 0).max())

    assert leak(run(implementation)) == (0, 0)
    ignores_the_ids = leak(lambda q, k, v, ids: run(implementation)(q, k, v, None))
    assert min(ignores_the_ids) > 0.1


def test_auto_takes_what_the_platform_and_shapes_allow(caplog):
    q = jax.ShapeDtypeStruct((2, 256, 8, 64), jnp.bfloat16)
    with caplog.at_level(logging.INFO, 'llama_jax'):
        for _ in range(2):
            assert choose(q, q, packed=True) in ('chunked', 'splash', 'cudnn')
    assert len(caplog.messages) <= 1  # once for a reason, over the whole process
    unsupported = attention_cudnn.unsupported
    assert unsupported(q, q, True, 2) is None
    assert 'float32' in unsupported(jax.ShapeDtypeStruct(q.shape, jnp.float32), q, False, 2)
    assert 'head_dim 20' in unsupported(jax.ShapeDtypeStruct((2, 256, 8, 20), q.dtype), q, False, 2)
    long = jax.ShapeDtypeStruct((2, 65_536, 8, 64), q.dtype)
    assert unsupported(long, long, False, 2) is None
    assert 'mask of 16.0 GiB' in unsupported(long, long, True, 2)


def test_a_kernel_that_cannot_serve_is_refused_in_one_line():
    """cuDNN in fp32: elsewhere because of the platform, on an NVIDIA GPU because of the type."""
    platform = jax.default_backend()
    reason = f'it needs an NVIDIA GPU, and this is a {platform}'
    if platform == 'gpu':
        reason = 'it computes in bfloat16 or float16, not float32'
    with pytest.raises(InputError, match=f"'cudnn' cannot be used: {reason}; choose"):
        attention(*(jnp.asarray(a) for a in random_qkv(2, 2)), implementation='cudnn')


def test_memory_is_linear_in_the_length():
    def temporary_bytes(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def total(q, k, v, ids):
            return attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, implementation='chunked').sum()

        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        return gradients.lower(shape, shape, shape, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(32_768) < 2.2 * temporary_bytes(16_384)


@pytest.mark.parametrize('num_queries', [1, 4])
def test_queries_that_continue_a_cache(num_queries):
    """Row b's queries stand at slots q_start[b], ...; the slots after them hold rubbish."""
    q, k, v = random_qkv(8, 2, num_queries)
    q_start = np.array([0, 17], np.int32)
    slots = q_start[:, None] + np.arange(num_queries)
    mask = slots[:, :, None] >= np.arange(LENGTH)
    for b in range(BATCH):
        k[b, slots[b, -1] + 1 :] = v[b, slots[b, -1] + 1 :] = 1e30

    out = attention(*(jnp.asarray(a) for a in (q, k, v)), q_start=jnp.asarray(q_start))

    np.testing.assert_allclose(out, reference(q, k, v, mask, np.zeros_like(q))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('packed', [False, True], ids=['one document', 'packed'])
def test_gradients_show_who_sees_whom(packed):
    """The gradient of query t by the value, key and query of slot s is exactly zero where t may not see s."""
    q, k, v = random_qkv(4, 2)
    segments = dict.fromkeys(['q_segment_ids', 'kv_segment_ids'], jnp.asarray(SEGMENT_IDS)) if packed else {}
    direction = np.random.default_rng(1).normal(size=(4, HEAD_DIM)).astype(np.float32)

    def project(*qkv):
        return jnp.einsum('btnh,nh->bt', attention(*qkv, **segments), direction).sum(0)

    jacobians = jax.jacrev(project, argnums=(0, 1, 2))(q, k, v)

    by_q, by_k, by_v = (np.abs(j).max((-1, -2)).transpose(1, 0, 2) for j in jacobians)  # [B, T, S]
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))[None].repeat(BATCH, 0)
    if packed:
        seen &= SEGMENT_IDS[:, :, None] == SEGMENT_IDS[:, None, :]
    assert (by_v[~seen] == 0).all()
    assert (by_k[~seen] == 0).all()
    assert (by_v[seen] > 0).all()
    assert (by_q * (1 - np.eye(LENGTH)) == 0).all()


def test_a_query_that_sees_no_key_poisons_nothing():
    q, k, v = random_qkv(2, 2)
    nobody = np.full_like(SEGMENT_IDS, 9)
    nobody[:, :4] = SEGMENT_IDS[:, :4]

    def total(*qkv):
        out = attention(*qkv, q_segment_ids=jnp.asarray(nobody), kv_segment_ids=jnp.asarray(SEGMENT_IDS))
        return jnp.sum(out[:, :4] ** 2) + 0.0 * jnp.sum(out)

    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    assert all(np.isfinite(a).all() for a in (value, *gradients))


def test_bf16_keeps_the_softmax_in_fp32():
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in random_qkv(4, 2))

    out = attention(8 * q, k, v)

    mask = np.tril(np.ones((BATCH, LENGTH, LENGTH), bool))
    q64, k64, v64 = (np.asarray(a, np.float64) for a in (8 * q, k, v))
    expected = reference(q64, k64, v64, mask, np.zeros_like(q64))[0]
    assert out.dtype == jnp.bfloat16
    # Weights and result are rounded to 8 bits (2^-8 of 3); scores of size 30 in bf16 are off by 0.1.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.03)


def test_unknown_implementation_is_refused():
    with pytest.raises(InputError, match="'fast'.*reference"):
        attention(*(jnp.asarray(a) for a in random_qkv(2, 2)), implementation='fast')
