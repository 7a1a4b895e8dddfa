"""Rows split over devices: the balanced order and back, and attention that sees the whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.ops.attention import attention
from llama_jax.ops.context_parallel import balanced_order, from_balanced, to_balanced
from llama_jax.partitioning import Partitioner, make_mesh, parse_rules

AXES = ('batch', 'length', 'act_embed')


def partitioner(sizes: dict[str, int], rules: str = '') -> Partitioner:
    return Partitioner(
        make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]), parse_rules(rules)
    )


def test_each_device_holds_an_early_and_a_late_chunk():
    # Four devices of two chunks of two tokens: 0 and 7, 1 and 6, 2 and 5, 3 and 4.
    assert balanced_order(16, 4).tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]


@pytest.mark.parametrize('size', [2, 4, 8])
def test_there_and_back(size):
    split = partitioner({'context': size})
    x = jnp.arange(2 * 48 * 3).reshape(2, 48, 3)

    def both(x):
        balanced = to_balanced(x, AXES, split)
        return balanced, from_balanced(balanced, AXES, split)

    balanced, back = jax.jit(both)(x)

    np.testing.assert_array_equal(balanced, x[:, balanced_order(48, size)])
    np.testing.assert_array_equal(back, x)


def test_a_row_that_does_not_divide_is_refused():
    split = partitioner({'context': 4})
    with pytest.raises(InputError, match='sequence length 12 does not divide .* multiple of 8'):
        to_balanced(jnp.zeros((1, 12, 1)), AXES, split)
    with pytest.raises(InputError, match='it must be a multiple of 8'):
        split.batch_sharding(1, 12)


@pytest.mark.parametrize(
    'packed', [pytest.param(False, marks=pytest.mark.slow), True], ids=['one document', 'packed']
)
@pytest.mark.parametrize(
    ('implementation', 'sizes', 'rules', 'length'),
    [
        ('reference', {'context': 4}, '', 48),
        ('chunked', {'context': 4}, '', 560),  # a chunk of 70 is no multiple of its block
        pytest.param('chunked', {'data': 2, 'context': 2, 'tensor': 2}, '', 256, marks=pytest.mark.slow),
        (
            'chunked',
            {'context': 2, 'tensor': 4},
            'kv_heads=',
            48,
        ),  # two key/value heads for four parts of the queries'
        ('chunked', {'tensor': 2}, 'kv_heads=', 48),
        ('splash', {'context': 2}, '', 512),
    ],
)
def test_attention_is_that_of_whole_rows(implementation, sizes, rules, length, packed):
    split = partitioner(sizes, rules)
    size = sizes.get('context', 1)
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(2, length, n, 16)), jnp.float32) for n in (8, 2, 2, 8))
    documents = np.sort(rng.integers(1, 5, size=(2, length)), axis=1).astype(np.int32)
    order = balanced_order(length, size) if size > 1 else np.arange(length)

    def both(q, k, v, ids, cotangent, partitioner, implementation):
        ids = ids if packed else None
        kernel = functools.partial(attention, partitioner=partitioner, implementation=implementation)
        out, vjp = jax.vjp(lambda *qkv: kernel(*qkv, q_segment_ids=ids, kv_segment_ids=ids), q, k, v)
        return out, *vjp(cotangent)

    args = (q, k, v, jnp.asarray(documents), cotangent)
    want = jax.jit(functools.partial(both, partitioner=None, implementation='reference'))(*args)
    args = tuple(x[:, order] for x in args)
    split_both = functools.partial(both, partitioner=split, implementation=implementation)
    found = jax.jit(split_both)(*args)

    for name, actual, expected in zip(('out', 'q', 'k', 'v'), found, want, strict=True):
        # Sums of up to 560 terms in another order, each rounded by 6e-8.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual / scale, expected[:, order] / scale, atol=3e-6, err_msg=name)
