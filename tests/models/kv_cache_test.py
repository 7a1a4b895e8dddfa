import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.models.kv_cache import CACHE_DTYPES, KVCache, cache_dtype
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


def test_int8_takes_a_quarter_and_a_scale_for_each_token_and_head():
    of_fp32, of_int8 = (KVCache.create(toy.CONFIG, 2, 6, dtype) for dtype in (jnp.float32, jnp.int8))
    plain, found = (
        sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))
        for cache in (of_fp32, of_int8)
    )
    assert found == plain / 4 + 4 * 2 * 6 * toy.CONFIG.num_kv_heads * 2 * toy.CONFIG.num_layers
    assert of_int8.max_len == 6


def test_int8_is_written_where_it_goes_within_half_a_step():
    """Keys by a matrix that keeps lengths: an error of half a step a channel is one of as many in any direction."""
    cache = KVCache.create(toy.CONFIG, 2, 6, jnp.int8).replace(length=jnp.array([1, 3]))
    k, v = values((2, 2, 4, 8), 0), values((2, 2, 4, 8), 1)
    k = k.at[..., 3].multiply(20)  # as RoPE's slowest channels are
    written = cache.layer(1).write(k, v)
    held_k, held_v = cache.layer(1).as_held(k, v)
    for array, held in ((written.keys, None), (written.values, held_v)):
        assert array.qvalue.dtype == jnp.int8 and array.scale.shape == (2, 4, 6, 1)
        assert jnp.count_nonzero(array.scale) == 2 * 4 * 2 and jnp.abs(array.qvalue).max() == 127
        for row, start in enumerate((1, 3)):
            assert jnp.all(array.scale[row, :, start : start + 2] > 0)
            if held is not None:
                found = array.materialize()[row, :, start : start + 2].swapaxes(0, 1)
                np.testing.assert_allclose(found, held[row], rtol=1e-6)
    step = jnp.abs(v).max(-1, keepdims=True) / 127
    assert jnp.all(jnp.abs(held_v - v) <= 0.5001 * step)
    scale = jnp.concatenate([written.keys.scale[0, :, 1:3], written.keys.scale[1, :, 3:5]], axis=1)[..., 0]
    lost = jnp.linalg.norm(held_k - k, axis=-1).transpose(2, 0, 1).reshape(4, 4)
    assert jnp.all(lost <= 0.5001 * scale * 8**0.5)
    # One channel of 20 is spread over all: the largest code stands for less than half of it.
    assert jnp.all(scale < 0.5 * jnp.abs(k).max(-1).transpose(2, 0, 1).reshape(4, 4) / 127 + 0.02)


def test_as_held_leaves_floats_alone():
    k = values((1, 1, 4, 8))
    assert all(held is k for held in KVCache.create(toy.CONFIG, 1, 2, jnp.float32).layer(0).as_held(k, k))


def test_types_have_names():
    assert [cache_dtype(name, jnp.bfloat16) for name in CACHE_DTYPES] == [jnp.bfloat16, jnp.int8]
    with pytest.raises(InputError, match="unknown type of the cache 'int4'; choose from auto, int8"):
        cache_dtype('int4', jnp.float32)
