"""Attention against a loop over heads in float64: values, gradients, order of time, packed documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops.attention import attention
from llama_jax.types import InputError

BATCH, LENGTH, HEAD_DIM = 2, 24, 16
SEGMENT_IDS = np.stack([np.repeat([1, 2, 3, 0], [5, 1, 12, 6]), np.repeat([1, 2], [20, 4])]).astype(np.int32)


def random_qkv(num_heads: int, num_kv_heads: int, num_queries: int = LENGTH) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = [(num_queries, num_heads), (LENGTH, num_kv_heads), (LENGTH, num_kv_heads)]
    return tuple(rng.normal(size=(BATCH, *shape, HEAD_DIM)).astype(np.float32) for shape in shapes)


def reference(q, k, v, mask, cotangent):
    """Attention and its gradients in float64, from the formulas: (out, dq, dk, dv)."""
    q, k, v, cotangent = (a.astype(np.float64) for a in (q, k, v, cotangent))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            kv = n // (q.shape[2] // k.shape[2])
            scores = np.where(mask[b], q[b, :, n] @ k[b, :, kv].T / np.sqrt(HEAD_DIM), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, :, n] = weights @ v[b, :, kv]
            d_weights = cotangent[b, :, n] @ v[b, :, kv].T
            d_scores = (
                weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / np.sqrt(HEAD_DIM)
            )
            dq[b, :, n] = d_scores @ k[b, :, kv]
            dk[b, :, kv] += d_scores.T @ q[b, :, n]
            dv[b, :, kv] += weights.T @ cotangent[b, :, n]
    return out, dq, dk, dv


@pytest.mark.parametrize('implementation', ['auto', 'reference'])
@pytest.mark.parametrize('packed', [False, True], ids=['one document', 'packed'])
@pytest.mark.parametrize(('num_heads', 'num_kv_heads'), [(4, 4), (8, 2), (3, 1)])
def test_values_and_gradients(num_heads, num_kv_heads, packed, implementation):
    q, k, v = random_qkv(num_heads, num_kv_heads)
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    segments = dict.fromkeys(['q_segment_ids', 'kv_segment_ids'], jnp.asarray(SEGMENT_IDS)) if packed else {}

    out, vjp = jax.vjp(lambda *qkv: attention(*qkv, **segments, implementation=implementation), q, k, v)

    mask = np.tril(np.ones((BATCH, LENGTH, LENGTH), bool))
    if packed:
        mask &= SEGMENT_IDS[:, :, None] == SEGMENT_IDS[:, None, :]
    for actual, expected in zip(
        (out, *vjp(jnp.asarray(cotangent))), reference(q, k, v, mask, cotangent), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)  # fp32 sums of up to 100 products


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
