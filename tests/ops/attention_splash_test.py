"""Splash attention's tiles, and the kernel compiled for TPUs that are not there; its values: attention_test.py."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from llama_jax.ops.attention_splash import block_sizes


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
