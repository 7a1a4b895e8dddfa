"""What the real train step costs on eight emulated devices: the formula's FLOPs, the collectives that were planned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import abstract_params, abstract_params_and_axes
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.preflight.costs import Costs, program_costs
from llama_jax.preflight.hlo import Program
from llama_jax.preflight.report import device_bytes
from llama_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama_jax.train.state import abstract_state
from llama_jax.train.step import compile_train_step
from llama_jax.train.throughput import training_flops_per_token
from llama_jax.types import LMBatch
from tests import toy

ROWS, LENGTH = 16, 16
FP32 = 4


@functools.cache
def costs(
    remat: str = 'none',
    num_microbatches: int = 1,
    num_chunks: int = 1,
    attention: str = 'reference',
    **sizes: int,
) -> Costs:
    """Of one update of the toy model, as XLA compiles it for this mesh; plain attention is all in its FLOPs."""
    partitioner = Partitioner(make_mesh(sizes))
    model = toy.make_model(remat=remat, partitioner=partitioner, attention_implementation=attention)
    tx = make_optimizer(OptimizerConfig(), 1e-3)
    state = abstract_state(*abstract_params_and_axes(model), tx, partitioner)
    loss_fn = language_model_loss(model, num_chunks=num_chunks)
    step = compile_train_step(state, loss_fn=loss_fn, tx=tx, num_microbatches=num_microbatches)
    sharding = partitioner.batch_sharding(ROWS, LENGTH)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=sharding)
    batch = LMBatch(ids, ids, ids, ids, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_, sharding=sharding))
    rng = jax.eval_shape(lambda: jax.random.key(0))
    counted = program_costs(Program(step.lower(state, {}, batch, rng).compile().as_text()))
    # How many blocks of keys `chunked` visits depends on the segments; a collective in its loops would be one too many.
    assert not counted.unknown_loops or attention == 'chunked'
    # XLA leaves sums over axes of one device, which move nothing.
    return dataclasses.replace(counted, collectives=[c for c in counted.collectives if c.groups.shape[1] > 1])


MESHES = [
    {'fsdp': 2, 'tensor': 4},
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in [{'fsdp': 8}, {'data': 2, 'tensor': 4}, {'dcn_data': 2, 'fsdp': 4}]
    ),
]


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_flops_are_those_of_the_formula(sizes):
    """To the last one: attention in full, every layer as often as its loop runs, split evenly over the devices."""
    _, full = training_flops_per_token(toy.CONFIG, LENGTH)
    assert costs(**sizes).flops == full * ROWS * LENGTH / 8


def test_flops_with_microbatches_chunks_and_recomputation():
    _, full = training_flops_per_token(toy.CONFIG, LENGTH)
    wanted = full * ROWS * LENGTH / 8
    assert costs(fsdp=8, num_microbatches=2, num_chunks=2).flops == wanted
    c = toy.CONFIG
    # Of a layer's forward pass only the last product, `down`, is not wanted again.
    layers = full - 6 * c.vocab_size * c.embed_dim
    again = layers / 3 - 2 * c.num_layers * c.mlp_dim * c.embed_dim
    assert costs(fsdp=8, remat='full').flops == wanted + again * ROWS * LENGTH / 8


def weight_bytes() -> tuple[int, int]:
    """(of the matrices in the layers, of embedding or head) in fp32."""
    params = abstract_params(toy.make_model())
    matrices = [leaf for leaf in jax.tree.leaves(params['blocks']) if leaf.ndim > 2]
    return sum(leaf.size for leaf in matrices) * FP32, params['embed'].size * FP32


def moved(kind: str, **options) -> int:
    return sum(c.bytes * c.times for c in costs(**options).collectives if c.kind == kind)


# The one the compiler splits, and the one that runs by default on CPUs, split by `shard_map` as all other kernels are.
split_attention = pytest.mark.parametrize(
    'attention',
    [{}, pytest.param({'attention': 'chunked'}, marks=pytest.mark.slow)],
    ids=['reference', 'chunked'],
)


@split_attention
def test_fsdp_gathers_every_weight_twice_and_nothing_else(attention):
    """Forward and backward; of the embedding's look-up, whose gradient needs no weight, and of the head, once."""
    layers, table = weight_bytes()
    gathers = [c for c in costs(**attention, fsdp=8).collectives if c.kind == 'all-gather']
    assert sum(c.times for c in gathers) == 2 * 7 * toy.CONFIG.num_layers + 2
    assert moved('all-gather', **attention, fsdp=8) == 2 * layers + 2 * table
    assert {c.groups.shape for c in gathers} == {(1, 8)}


@split_attention
def test_fsdp_sums_every_gradient_once(attention):
    """XLA for CPUs reduces where others reduce and scatter. Beside gradients there are norms and a few scalars."""
    layers, table = weight_bytes()
    small = 2000
    assert 0 <= moved('all-reduce', **attention, fsdp=8) - (layers + 2 * table) < small
    assert {c.kind for c in costs(**attention, fsdp=8).collectives} == {'all-gather', 'all-reduce'}


@pytest.mark.parametrize(
    'sizes',
    [
        {'fsdp': 4, 'tensor': 2},
        *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [{'fsdp': 8}, {'dcn_data': 2, 'fsdp': 4}]),
    ],
    ids=str,
)
def test_loss_chunks_gather_the_head_and_sum_its_gradient_no_more_often(sizes):
    """All chunks together move what one does; only the sums of losses, a few numbers a token, come with each."""
    few = ROWS * LENGTH * FP32
    for kind in ('all-gather', 'all-reduce'):
        one, four = (
            sum(c.bytes * c.times for c in costs(num_chunks=n, **sizes).collectives if c.kind == kind)
            for n in (1, 4)
        )
        assert abs(four - one) <= few, kind


@split_attention
def test_tensor_parallelism_sums_activations_only(attention):
    """Per layer two sums forward and five backward (of q, k, v, gate and up), over `tensor`; no weight is gathered."""
    sizes = {'data': 2, 'tensor': 4}
    assert moved('all-gather', **attention, **sizes) == 0
    activation = ROWS // 2 * LENGTH * toy.CONFIG.embed_dim * FP32
    over_tensor = sum(
        c.bytes * c.times
        for c in costs(**attention, **sizes).collectives
        if c.groups.shape == (2, 4) and c.bytes >= activation
    )
    # The embedding's look-up and the head's backward pass add one each; with the latter some versions of XLA send the
    # target's logit, one number a token.
    target = ROWS // 2 * LENGTH * FP32
    assert over_tensor - activation * (7 * toy.CONFIG.num_layers + 2) in (0, target)


def test_context_parallelism_gathers_keys_and_values_and_scatters_their_gradients():
    """Beside weights, which are spread over `context` too, and a row's halves, put in balanced order and back."""
    options, c = {'attention': 'chunked', 'data': 2, 'context': 4}, toy.CONFIG
    layers, table = weight_bytes()
    tokens = ROWS // 2 * LENGTH * FP32  # bytes of one number for each token of a device's rows
    keys_and_values = 2 * c.num_layers * tokens * c.num_kv_heads * c.head_dim
    # Segment ids are the same for all layers.
    assert moved('all-gather', **options) == 2 * layers + 2 * table + keys_and_values + tokens
    assert moved('reduce-scatter', **options) == keys_and_values
    # Tokens, segments and positions there; activations back, and their gradients.
    assert moved('collective-permute', **options) == (3 + 2 * c.embed_dim) * tokens // 4


def test_between_slices_go_only_gradients():
    """`dcn_data` is the outermost axis: pairs (i, i + 4), which share no slice."""
    sizes = {'dcn_data': 2, 'fsdp': 4}
    layers, table = weight_bytes()
    across = [c for c in costs(**sizes).collectives if c.groups.shape == (4, 2)]
    assert {tuple(pair) for c in across for pair in c.groups.tolist()} == {(i, i + 4) for i in range(4)}
    assert {c.kind for c in across} == {'all-reduce'}
    assert (
        sum(c.bytes * c.times for c in across) == (layers + table) / 4
    )  # a device's part; the embedding's is below
    gathers = [c for c in costs(**sizes).collectives if c.kind == 'all-gather']
    assert {c.groups.shape for c in gathers} == {(2, 4)}


def test_bytes_on_a_device():
    partitioner = Partitioner(make_mesh({'fsdp': 2, 'tensor': 4}))
    state = abstract_state(
        *abstract_params_and_axes(toy.make_model()), make_optimizer(OptimizerConfig(), 1e-3), partitioner
    )
    layers, table = weight_bytes()
    norms = (2 * toy.CONFIG.num_layers + 1) * toy.CONFIG.embed_dim * FP32
    assert device_bytes(state.params) == (layers + 2 * table) // 8 + norms
    assert device_bytes(state.opt_state) == 2 * device_bytes(state.params) + 4  # two moments and a counter
