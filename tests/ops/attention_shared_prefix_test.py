import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.ops.attention import attention
from llama_jax.ops.attention_reference import reference_attention
from llama_jax.ops.attention_shared_prefix import SHARED


def inputs(length, seed=0):
    q, k, v = (
        jax.random.normal(key, (2, length, heads, 8))
        for key, heads in zip(jax.random.split(jax.random.key(seed), 3), (4, 2, 2), strict=True)
    )
    # A context of 10, then continuations of 20, the last padding.
    ids = np.maximum((np.arange(length) - 10) // 20 + 1, 0)
    ids = np.where(np.arange(length) < 10, SHARED, ids)
    ids[-5:] = 0
    return q, k, v, jnp.array(np.stack([ids, np.roll(ids, 3)]), jnp.int32)


@pytest.mark.parametrize('length', [48, 200])  # in one tile, in several
def test_a_query_sees_the_context_and_its_own_continuation(length):
    q, k, v, ids = inputs(length)
    slots = np.arange(length)
    of_context = (ids[:, :, None] > 0) & (ids[:, None, :] == SHARED)
    mask = ((ids[:, :, None] == ids[:, None, :]) | of_context) & (slots[:, None] >= slots[None, :])[None]
    ours = functools.partial(attention, q_segment_ids=ids, kv_segment_ids=ids, implementation='shared_prefix')
    found, backward = jax.vjp(jax.jit(ours), q, k, v)
    wanted, wanted_backward = jax.vjp(jax.jit(lambda *arrays: reference_attention(*arrays, mask)), q, k, v)
    # fp32 sums in another order.
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    gradient = jax.random.normal(jax.random.key(1), q.shape)
    for one, other in zip(backward(gradient), wanted_backward(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_it_is_asked_for_by_name_and_needs_segments():
    q, k, v, ids = inputs(48)
    plain = attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids)
    shared = attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, implementation='shared_prefix')
    assert jnp.abs(plain - shared).max() > 0.1
    with pytest.raises(InputError, match='it needs segment ids'):
        attention(q, k, v, implementation='shared_prefix')
