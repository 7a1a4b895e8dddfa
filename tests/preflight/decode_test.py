"""What a step of generation must read: the bytes of the arrays that a run would hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.models.llama import LlamaForCausalLM, init_params, param_axes
from llama_jax.models.presets import PRESETS
from llama_jax.models.unstacked import unstack
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.preflight.compile import Compiled
from llama_jax.preflight.decode import bytes_to_read, decode_arguments
from llama_jax.preflight.report import Work, describe, step_report
from llama_jax.preflight.topology import Topology
from llama_jax.quantize.params import quantize

CONFIG = dataclasses.replace(
    PRESETS['tiny'], embed_dim=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=128, vocab_size=320,
    tie_embeddings=False,
)  # fmt: skip


def stored_bytes(leaf: jax.Array) -> int:
    """Of a device's part; NumPy would hold one int4 in a byte."""
    part = leaf.addressable_shards[0].data
    return part.size // 2 if part.dtype == jnp.int4 else part.nbytes


@pytest.mark.parametrize(('weights', 'of_cache'), [(None, 'auto'), ('int8', 'int8'), ('int4', 'auto')])
def test_a_step_must_read_weights_as_they_are_stored_and_the_cache(weights, of_cache):
    partitioner = Partitioner(make_mesh({'data': 2, 'tensor': 4}))
    model = LlamaForCausalLM(CONFIG, dtype=jnp.bfloat16, partitioner=partitioner, cache_dtype=of_cache)
    params, cache, tokens = decode_arguments(model, 8, 32, weights)
    drawn = jax.jit(
        lambda key: init_params(model, key),
        out_shardings=partitioner.tree_shardings(
            jax.eval_shape(lambda: init_params(model, jax.random.key(0))), param_axes(model)
        ),
    )(jax.random.key(0))
    real = unstack(drawn if weights is None else quantize(drawn, weights), jnp.bfloat16)
    for wanted, found in zip(jax.tree.leaves(params), jax.tree.leaves(real), strict=True):
        assert (wanted.shape, wanted.dtype, wanted.sharding.spec) == (
            found.shape, found.dtype, found.sharding.spec
        )  # fmt: skip
    read = {name: leaf for name, leaf in real.items() if name != 'embed'}
    # Keys and values of 2 layers, 4 rows, one head of 8, in fp32 as a CPU has them, or in int8 with a scale.
    held = 2 * 2 * (8 // 2) * (4 // 4) * 32 * (4 * 8 if of_cache == 'auto' else 8 + 4)
    assert bytes_to_read(params, cache) == sum(map(stored_bytes, jax.tree.leaves(read))) + held
    assert tokens.shape == (8,)


def test_the_bound_is_the_time_of_reading():
    """8.19 GB at v5e's 819 GB/s are 10 ms; 8 rows then get 800 tokens a second, whatever the program would do."""
    compiled = Compiled(None, None, 20 * 2**30, 16 * 2**30, 0.0, 0.0, ())
    work = Work(8, (1.0, 1.0), parameters=2**30, must_read=8_190_000_000)
    report = step_report(compiled, work, Topology.parse('v5e:2x2'), ())
    reading = report['reading']
    assert (reading['bytes'], reading['seconds']) == (8_190_000_000, pytest.approx(0.01))
    assert reading['tokens_per_second'] == pytest.approx(800)
    assert '8.19 GB a device, takes 10.00 ms: at most 800 tokens/s of all rows' in describe('', report)
    on_half_a_chip = step_report(compiled, work, Topology.parse('tpu7x:2x2x1'), ())['reading']['seconds']
    assert np.isclose(on_half_a_chip, 8.19 / 7380 * 2)
