"""Splash attention's tiles: rows of several, and the kernel compiled for TPUs that are not there.

Its values in rows of one tile: attention_test.py.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops.attention import attention
from llama_jax.ops.attention_splash import block_sizes
from llama_jax.ops.context_parallel import balanced_order
from llama_jax.partitioning import Partitioner, make_mesh
from tests import toy


@pytest.mark.parametrize('length', [128, 384, 1024, 4096, 5120, 131_072])
@pytest.mark.parametrize('parts', [1, 8])
def test_tiles_divide_queries_and_keys(length, parts):
    sizes = block_sizes(length, parts * length)
    for block in (sizes.block_q, sizes.block_q_dkv, *filter(None, [sizes.block_q_dq])):
        assert length % block == 0 and block % 128 == 0
    for block in (sizes.block_kv, sizes.block_kv_dkv, *filter(None, [sizes.block_kv_dq])):
        assert parts * length % block == 0
    assert sizes.block_kv % sizes.block_kv_compute == 0 and sizes.block_kv_compute % 128 == 0
    assert sizes.has_backward_blocks
    # Fused, it holds a query gradient for every block of keys: at most four.
    assert not sizes.use_fused_bwd_kernel or parts * length // sizes.block_kv_dkv <= 4


@pytest.mark.parametrize(
    ('length', 'parts', 'packed', 'blocks', 'fused'),
    [
        pytest.param(384, 1, False, 3, True, marks=pytest.mark.slow),
        (384, 1, True, 3, True),
        pytest.param(640, 1, False, 5, False, marks=pytest.mark.slow),
        pytest.param(640, 1, True, 5, False, marks=pytest.mark.slow),
        # A device's middle block of queries lies in both of its chunks, before and behind keys.
        (1536, 2, True, 3, True),
        pytest.param(1536, 2, False, 3, True, marks=pytest.mark.slow),
        *(
            pytest.param(*case, packed, *tiles, marks=pytest.mark.slow)
            for *case, tiles in [(2560, 2, (5, False)), (3072, 4, (3, True)), (2048, 8, (2, True))]
            for packed in (False, True)
        ),
    ],
)
def test_rows_of_several_blocks(length, parts, packed, blocks, fused):
    sizes = block_sizes(length // parts, length)
    assert length // sizes.block_kv == blocks and sizes.use_fused_bwd_kernel == fused
    split, order = None, np.arange(length)
    if parts > 1:
        split = Partitioner(make_mesh({'context': parts}, jax.devices()[:parts]))
        order = balanced_order(length, parts)
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.standard_normal((1, length, n, 16)), jnp.float32) for n in (2, 1, 1, 2)
    )
    # Documents that end inside blocks; one is longer than a block.
    ids = jnp.asarray(np.searchsorted([70, length // 2 + 9, length - 5], np.arange(length))[None], jnp.int32)

    def both(implementation, partitioner, order):
        segments = ids[:, order] if packed else None

        def attend(q, k, v):
            return attention(
                q, k, v, q_segment_ids=segments, kv_segment_ids=segments,
                implementation=implementation, partitioner=partitioner,
            )  # fmt: skip

        out, vjp = jax.vjp(attend, q[:, order], k[:, order], v[:, order])
        return out, *vjp(cotangent[:, order])

    wanted = jax.jit(lambda: both('reference', None, np.arange(length)))()
    found = jax.jit(lambda: both('splash', split, order))()

    for name, actual, expected in zip(('out', 'q', 'k', 'v'), found, wanted, strict=True):
        # Sums of up to 3,072 terms in another order, each rounded by 6e-8.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual / scale, expected[:, order] / scale, atol=3e-6, err_msg=name)


@pytest.mark.slow
def test_a_model_that_recomputes_nothing_trains_with_it():
    batch = toy.packed_batch(2, 32)

    def gradients(implementation):
        model = toy.make_model(attention_implementation=implementation, remat='none')

        def total(params):
            logits, _ = model.apply({'params': params}, batch.tokens, batch.positions, batch.segment_ids)
            return jnp.sum(jax.nn.log_softmax(logits)[..., 0])

        return jax.jit(jax.grad(total))(toy.make_params(model))

    for actual, expected in zip(
        *(jax.tree.leaves(gradients(kernel)) for kernel in ('splash', 'reference')), strict=True
    ):
        scale = np.abs(expected).max()
        # Three layers deep, with scores far from uniform.
        np.testing.assert_allclose(actual / scale, expected / scale, atol=2e-5)


# Gradients of packed rows on meshes of a v5e and of a v5p, one of them with rows split over devices.
COMPILE = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from llama_jax.ops.attention import attention
from llama_jax.partitioning import MESH_AXES, Partitioner

for topology, sizes, length, head_dim in (
    ('v5e:2x2', {'fsdp': 2, 'tensor': 2}, 1000, 64),
    ('v5p:2x2x1', {'fsdp': 2, 'context': 2}, 8192, 128),
):
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    devices = np.array(devices).reshape([sizes.get(axis, 1) for axis in MESH_AXES])
    partitioner = Partitioner(jax.sharding.Mesh(devices, MESH_AXES))

    def argument(heads, axis):
        shape = (2, length, heads, head_dim)
        sharding = partitioner.sharding(('batch', 'length', axis, 'head_dim'), shape)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def total(q, k, v, ids):
        out = attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, partitioner=partitioner)
        return out.astype(jnp.float32).sum()

    q, k = argument(8, 'heads'), argument(2, 'kv_heads')
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=partitioner.sharding(('batch', 'length'), (2, length)))
    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k, ids).compile()
    print('COMPILED', compiled.as_text().count('tpu_custom_call'), compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install 'llama_jax[tpu]'"
)
@pytest.mark.slow
def test_a_tpu_program_takes_it_by_itself():
    process = subprocess.run(
        [sys.executable, '-c', COMPILE],
        cwd=pathlib.Path(__file__).resolve().parents[2],
        env=os.environ | {'TPU_SKIP_MDS_QUERY': '1'}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = [tuple(map(int, match)) for match in re.findall(r'COMPILED (\d+) (\d+)', process.stdout)]
    # Forward, and backward in one kernel where rows are short, in two beyond.
    assert [kernels for kernels, _ in found] == [2, 3]
    # Scores would take 2 x 4 x 8192 x 8192 / 2 values of 4 bytes: 1 GiB.
    assert max(memory for _, memory in found) < 200 * 2**20
