import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.models.kv_cache import KVCache
from tests import toy


def values(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_a_new_cache_is_empty_and_has_the_shape_of_the_model():
    cache = KVCache.create(toy.CONFIG, batch_size=2, max_len=6)
    assert cache.keys.shape == cache.values.shape == (3, 2, 6, 4, 8)
    assert cache.keys.dtype == jnp.bfloat16
    assert cache.length.tolist() == [0, 0]


def test_rows_are_written_each_at_its_own_place_in_one_layer_only():
    cache = KVCache.create(toy.CONFIG, 2, 6, jnp.float32).replace(length=jnp.array([1, 3]))
    k, v = values((2, 2, 4, 8), 0), values((2, 2, 4, 8), 1)
    written = cache.write(jnp.int32(1), k, v)
    want = np.zeros((2, 6, 4, 8), np.float32)
    want[0, 1:3], want[1, 3:5] = k
    keys, found = written.layer(jnp.int32(1))
    np.testing.assert_array_equal(keys, want)
    want[0, 1:3], want[1, 3:5] = v
    np.testing.assert_array_equal(found, want)
    assert not written.keys[jnp.array([0, 2])].any()
    assert written.length.tolist() == [1, 3]  # counted by `advance`, once for all layers


def test_what_is_not_counted_is_overwritten():
    first, second = values((2, 3, 4, 8), 0), values((2, 1, 4, 8), 1)
    cache = KVCache.create(toy.CONFIG, 2, 6, jnp.float32).replace(is_empty=True)
    cache = cache.write(jnp.int32(0), first, first).advance(jnp.array([3, 1]))
    assert cache.length.tolist() == [3, 1] and not cache.is_empty
    keys, _ = cache.write(jnp.int32(0), second, second).layer(jnp.int32(0))
    np.testing.assert_array_equal(keys[0, :4], np.concatenate([first[0], second[0]]))
    np.testing.assert_array_equal(keys[1, :2], np.stack([first[1, 0], second[1, 0]]))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_the_cache_keeps_its_dtype(dtype):
    cache = KVCache.create(toy.CONFIG, 1, 2, dtype)
    k = values((1, 1, 4, 8))
    assert cache.write(jnp.int32(0), k, k).keys.dtype == dtype
