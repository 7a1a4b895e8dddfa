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
    assert [array.shape for array in cache.keys + cache.values] == [(2, 4, 6, 8)] * 2 * toy.CONFIG.num_layers
    assert cache.keys[0].dtype == jnp.bfloat16 and cache.max_len == 6
    assert cache.length.tolist() == [0, 0]


def test_rows_are_written_each_at_its_own_place():
    cache = KVCache.create(toy.CONFIG, 2, 6, jnp.float32).replace(length=jnp.array([1, 3]))
    k, v = values((2, 2, 4, 8), 0), values((2, 2, 4, 8), 1)
    written = cache.layer(1).write(k, v)
    want = np.zeros((2, 6, 4, 8), np.float32)
    want[0, 1:3], want[1, 3:5] = k
    np.testing.assert_array_equal(written.keys, want.swapaxes(1, 2))
    want[0, 1:3], want[1, 3:5] = v
    np.testing.assert_array_equal(written.values, want.swapaxes(1, 2))
    assert written.length.tolist() == [1, 3]  # counted by `advance`, once for all layers
    other = cache.with_layers([cache.layer(0), written, cache.layer(2)])
    assert other.keys[1] is written.keys and other.values[1] is written.values
    assert not any(array.any() for array in other.keys[::2] + other.values[::2])


def test_what_is_not_counted_is_overwritten():
    first, second = values((2, 3, 4, 8), 0), values((2, 1, 4, 8), 1)
    cache = KVCache.create(toy.CONFIG, 2, 6, jnp.float32).replace(is_empty=True)
    layer = cache.layer(0).write(first, first)
    cache = cache.with_layers([layer] * 3).advance(jnp.array([3, 1]))
    assert cache.length.tolist() == [3, 1] and not cache.is_empty and not cache.layer(0).is_empty
    keys = cache.layer(0).write(second, second).keys.swapaxes(1, 2)
    np.testing.assert_array_equal(keys[0, :4], np.concatenate([first[0], second[0]]))
    np.testing.assert_array_equal(keys[1, :2], np.stack([first[1, 0], second[1, 0]]))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_the_cache_keeps_its_dtype(dtype):
    cache = KVCache.create(toy.CONFIG, 1, 2, dtype)
    k = values((1, 1, 4, 8))
    assert cache.layer(0).write(k, k).keys.dtype == dtype
