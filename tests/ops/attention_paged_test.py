"""A TPU's kernel over pages, by the reference that ships with it and interpreted: it computes what the formula does.

It is compiled for a TPU in `inference/program_test.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as kernel

from llama_jax.models.presets import PRESETS
from llama_jax.ops.attention_cached import attend_at_once
from llama_jax.ops.attention_paged import as_pages, paged_attention, unsupported


def by_reference(*arguments, sm_scale, **sizes):
    assert sizes.keys() == {'num_kv_pages_per_block', 'num_queries_per_block'}
    assert min(sizes.values()) > 0
    return kernel.ref_ragged_paged_attention(*arguments, sm_scale=sm_scale)


def attended(length, room, num_heads, num_kv_heads, dtype):
    """What rows of three lengths find in pages, and by the formula in float32."""
    q, k, v = (
        jax.random.normal(jax.random.key(seed), (3, size, heads, 128), dtype)
        for seed, (size, heads) in enumerate(
            [(length, num_heads), (room, num_kv_heads), (room, num_kv_heads)]
        )
    )
    start = jnp.array([0, 17, room - length])
    found = paged_attention(q, as_pages(k, v), start)
    assert found.dtype == dtype
    want = attend_at_once(*(x.astype(jnp.float32) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2))), start)
    return found.astype(jnp.float32), want


def test_rows_of_any_length_find_what_the_formula_finds(monkeypatch):
    monkeypatch.setattr(kernel, 'ragged_paged_attention', by_reference)
    monkeypatch.setattr(pltpu, 'with_memory_space_constraint', lambda x, _: x)  # of a TPU
    np.testing.assert_allclose(*attended(5, 256, 8, 4, jnp.float32), atol=2e-6)


# Weights are rounded to bfloat16 before values are multiplied by them, and the sum once more: 2^-9 of numbers up to 4.
@pytest.mark.slow
@pytest.mark.parametrize(
    ('length', 'room', 'num_heads', 'num_kv_heads'),
    [(1, 256, 8, 4), (5, 48, 8, 4), (1, 512, 8, 8), (40, 512, 8, 2), (3, 4096, 8, 1)],
)
def test_the_kernel_itself_finds_what_the_formula_finds(length, room, num_heads, num_kv_heads):
    from tests.ops.tpu_interpreter import interpreted  # of JAX's private modules

    with interpreted():
        found, want = attended(length, room, num_heads, num_kv_heads, jnp.bfloat16)
    np.testing.assert_allclose(found, want, atol=1.2e-2)


@pytest.mark.parametrize(
    ('preset', 'parts', 'reason'),
    [
        ('llama2_7b', 1, None),
        ('llama_13b', 1, None),
        ('llama2_70b', 8, None),
        ('llama3_8b', 2, None),
        ('llama3_1_405b', 8, None),
        ('llama_13b', 4, '10 heads of keys on a device are none of 1, 2, 4 and the multiples of 8'),
        ('llama_33b', 1, '52 heads of keys on a device are none of 1, 2, 4 and the multiples of 8'),
        ('llama2_70b', 16, '8 heads of keys do not divide over 16 devices'),
        ('llama3_2_1b', 1, 'head_dim 64 is not a multiple of 128'),
    ],
)
def test_shapes_that_the_kernel_cannot_read_are_told(preset, parts, reason):
    """Each was compiled for a v5e: those that are refused here are refused there, by an error of the kernel's own."""
    config = PRESETS[preset]
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    assert unsupported(*heads, jnp.bfloat16, parts) == reason
    assert unsupported(*heads, jnp.int8, parts) == 'pages hold bfloat16, not int8'
