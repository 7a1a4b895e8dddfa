"""The reader of compiled programs, on programs whose collectives and trips are worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from llama_jax.preflight.costs import COLLECTIVES, program_costs
from llama_jax.preflight.hlo import Array, Program, replica_groups

ROWS, WIDTH = 16, 32  # of one device's block, in fp32


def collectives_of(body, *, mesh=None):
    """{kind: (times, bytes of the whole value summed over times, devices in a group)} of a body run by each device."""
    mesh = mesh or jax.make_mesh((2, 4), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.shard_map(body, mesh=mesh, in_specs=P(('a', 'b')), out_specs=P(('a', 'b')), check_vma=False)
    compiled = jax.jit(split).lower(jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32)).compile()
    program = Program(compiled.as_text())
    assert program.num_partitions == 8
    found = {}
    for item in program_costs(program).collectives:
        times, size, _ = found.get(item.kind, (0, 0, 0))
        found[item.kind] = times + item.times, size + item.times * item.bytes, item.groups.shape[1]
    return found


BLOCK = ROWS * WIDTH * 4

# What each device does to its block, over axis b of 4 devices, and what is moved in bytes of the whole value.
ONE = {
    'all-gather': (lambda x: lax.all_gather(x, 'b', tiled=True)[:ROWS] * 2, 4 * BLOCK, 4),
    'all-reduce': (lambda x: lax.psum(x, 'b'), BLOCK, 4),
    'reduce-scatter': (lambda x: jnp.tile(lax.psum_scatter(x, 'b', tiled=True), (4, 1)), BLOCK, 4),
    'all-to-all': (lambda x: lax.all_to_all(x, 'b', 0, 0, tiled=True), BLOCK, 4),
    'collective-permute': (lambda x: lax.ppermute(x, 'b', [(i, (i + 1) % 4) for i in range(4)]), BLOCK, 2),
}


@pytest.mark.parametrize('kind', COLLECTIVES)
def test_a_collective_outside_and_inside_loops(kind):
    body, size, group = ONE[kind]
    assert collectives_of(body) == {kind: (1, size, group)}

    def loops(x):
        x = body(x) + 1
        inner = lambda x, _: (body(x) * 2, None)  # noqa: E731
        return lax.scan(lambda x, _: (lax.scan(inner, x, length=3)[0] + 1, None), x, length=5)[0]

    assert collectives_of(loops) == {kind: (1 + 3 * 5, (1 + 3 * 5) * size, group)}


def test_a_group_along_both_axes_is_all_devices():
    assert collectives_of(lambda x: lax.psum(x, ('a', 'b'))) == {'all-reduce': (1, BLOCK, 8)}


def test_sent_bytes_are_those_of_the_cheapest_algorithm():
    def body(x):
        return lax.psum(lax.all_gather(x, 'b', tiled=True), 'a')[:ROWS]

    mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.shard_map(body, mesh=mesh, in_specs=P(('a', 'b')), out_specs=P(('a', 'b')), check_vma=False)
    compiled = jax.jit(split).lower(jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32)).compile()
    sent = {c.kind: c.sent_bytes for c in program_costs(Program(compiled.as_text())).collectives}
    assert sent['all-gather'] == 3 * BLOCK  # of four blocks a device has one already
    assert sent['all-reduce'] in (
        2 * 4 * BLOCK / 2,
        2 * BLOCK / 2,
    )  # XLA may reduce the block before it gathers


@pytest.mark.parametrize(
    ('text', 'groups'),
    [
        ('replica_groups={{0,2},{1,3}}', [[0, 2], [1, 3]]),
        ('replica_groups={}, dimensions={0}', [[0, 1, 2, 3]]),
        ('replica_groups=[2,2]<=[4]', [[0, 1], [2, 3]]),
        ('replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}', [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}, dimensions={1}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
        ('source_target_pairs={{0,1},{1,0}}, metadata={op_name="x"}', [[0, 1], [1, 0]]),
    ],
)
def test_replica_groups_in_every_form(text, groups):
    np.testing.assert_array_equal(replica_groups(f', channel_id=1, {text}', 4), groups)


def test_unknown_replica_groups_are_refused():
    with pytest.raises(ValueError, match='unknown form'):
        replica_groups('replica_groups=<new form>', 4)


# As XLA for TPU writes it: no note of the trip count, a counter that goes up by two, its bound carried along, a
# product as a convolution, an asynchronous gather repeated by the parts that carry it on, a kernel with line ends.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=16

%begin (p: bf16[8,24]) -> (bf16[8,24], bf16[128,24]) {
  %p = bf16[8,24]{1,0:T(8,128)} parameter(0)
  %gather = bf16[128,24]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %start = (bf16[8,24]{1,0}, bf16[128,24]{1,0}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%carry_on (q: bf16[8,24]) -> bf16[128,24] {
  %q = bf16[8,24]{1,0:T(8,128)} parameter(0)
  ROOT %gather.2 = bf16[128,24]{1,0} all-gather(%q), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%all-reduce-scatter (r: f32[64,32]) -> f32[4,32] {
  %r = f32[64,32]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[64,32]{1,0} all-reduce(%r), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, to_apply=%add
  ROOT %part = f32[4,32]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={4,32}
}

%count (c: s32[]) -> s32[] {
  %c = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %next = s32[] add(%c, %two)
}

%body (carried: (s32[], s32[], bf16[8,24], f32[64,32])) -> (s32[], s32[], bf16[8,24], f32[64,32]) {
  %carried = (s32[], s32[], bf16[8,24]{1,0}, f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %n = s32[] get-tuple-element(%carried), index=1
  %w = bf16[8,24]{1,0:T(8,128)} get-tuple-element(%carried), index=2
  %g = f32[64,32]{1,0:T(8,128)} get-tuple-element(%carried), index=3
  %begun = (bf16[8,24]{1,0}, bf16[128,24]{1,0}) fusion(%w), kind=kCustom, calls=%begin
  %carried_on = bf16[128,24]{1,0:T(8,128)S(1)} fusion(%w), kind=kCustom, calls=%carry_on
  %x = bf16[64,128]{1,0:T(8,128)S(1)} constant({...})
  %product = bf16[64,24]{1,0:T(8,128)S(1)} convolution(%x, %carried_on), dim_labels=bf_io->bf
  %scattered = f32[4,32]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %i.2 = s32[] fusion(%i), kind=kLoop, calls=%count
  ROOT %out = (s32[], s32[], bf16[8,24]{1,0}, f32[64,32]{1,0}) tuple(%i.2, %n, %w, %g)
}

%condition (carried.2: (s32[], s32[], bf16[8,24], f32[64,32])) -> pred[] {
  %carried.2 = (s32[], s32[], bf16[8,24]{1,0}, f32[64,32]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%carried.2), index=0
  %n.2 = s32[] get-tuple-element(%carried.2), index=1
  ROOT %less = pred[] compare(%i.3, %n.2), direction=LT
}

ENTRY %main (a: bf16[8,24], b: f32[64,32]) -> bf16[8,24] {
  %a = bf16[8,24]{1,0:T(8,128)} parameter(0)
  %b = f32[64,32]{1,0:T(8,128)} parameter(1)
  %from = s32[] constant(1)
  %to = s32[] constant(8)
  %first = (s32[], s32[], bf16[8,24]{1,0}, f32[64,32]{1,0}) tuple(%from, %to, %a, %b)
  %loop = (s32[], s32[], bf16[8,24]{1,0}, f32[64,32]{1,0}) while(%first), condition=%condition, body=%body
  %kernel = bf16[2,4,256,64]{3,2,1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "1"
}}, backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"1000"}}}
  ROOT %result = bf16[8,24]{1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_a_program_as_the_tpu_compiler_writes_it():
    program = Program(TPU)
    assert [loop.trips for loop in program.loops()] == [4]  # 1, 3, 5, 7
    costs = program_costs(program)
    assert costs.unknown_loops == 0 and not costs.opaque_kernels
    assert costs.flops == 4 * 2 * 64 * 128 * 24 + 1000
    assert [(c.kind, c.bytes, c.times) for c in costs.collectives] == [
        ('all-gather', 128 * 24 * 2, 4),
        ('reduce-scatter', 64 * 32 * 4, 4),
    ]


def test_products_with_pages_count():
    """8 rows of 32 pages of 128 tokens, one query each, of 8 heads of 128: scores, and the values by them."""
    program = Program("""HloModule jit_step, is_scheduled=true, num_partitions=1

ENTRY %main (has: s32[8], table: s32[8,32], ends: s32[9], q: bf16[8,8,128], pages: bf16[256,128,2,128]) -> bf16[8,8,128] {
  %has = s32[8]{0} parameter(0)
  %table = s32[8,32]{1,0} parameter(1)
  %ends = s32[9]{0} parameter(2)
  %q = bf16[8,8,128]{2,1,0} parameter(3)
  %pages = bf16[256,128,2,128]{3,2,1,0} parameter(4)
  ROOT %ragged_paged_attention_kernel.4 = bf16[8,8,128]{2,1,0} custom-call(%has, %table, %ends, %q, %pages), custom_call_target="tpu_custom_call"
}
""")  # noqa: E501
    costs = program_costs(program)
    assert costs.flops == 2 * 2 * 8 * 8 * 128 * 32 * 128 and not costs.opaque_kernels


def test_a_gather_on_the_sparse_cores_counts():
    program = Program("""HloModule jit_step, is_scheduled=true, num_partitions=8

%called (p: bf16[1,36], t: token[]) -> bf16[1,288] {
  %p = bf16[1,36]{1,0} parameter(0)
  %t = token[] parameter(1)
  ROOT %gather = bf16[1,288]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['x'=8] {'x'}, dimensions={1}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[1,36]) -> bf16[1,288] {
  %a = bf16[1,36]{1,0} parameter(0)
  %ready = token[] after-all()
  %started = ((bf16[1,36]{1,0}, token[]), bf16[1,288]{1,0}) call-start(%a, %ready), async_execution_thread="sparsecore", to_apply=%called
  ROOT %done = bf16[1,288]{1,0} call-done(%started)
}
""")  # noqa: E501
    costs = program_costs(program)
    assert [(c.kind, c.bytes, c.times) for c in costs.collectives] == [('all-gather', 288 * 2, 1)]


def test_a_loop_of_unknown_length_is_reported():
    costs = program_costs(Program(TPU.replace('constant(8)', 'parameter(2)')))
    assert costs.unknown_loops == 1 and costs.flops == 2 * 64 * 128 * 24 + 1000


def test_sizes_of_arrays():
    assert Array('bf16', (3, 5), 0).bytes == 30
    assert Array('f8e4m3fn', (3, 5), 0).bytes == 15
    assert Array('s4', (4, 5), 0).bytes == 10
    assert Array('pred', (), 0).bytes == 1
    assert Array('c64', (2,), 0).bytes == 16
