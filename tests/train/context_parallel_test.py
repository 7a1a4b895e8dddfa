"""Training with rows split over devices: the loss, the gradients and the memory that are promised."""

import functools

import jax
import jax.numpy as jnp
import pytest

from llama_jax.errors import InputError
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.config import LlamaConfig
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama_jax.train.state import abstract_state, new_state, shardings_of
from llama_jax.train.step import compile_train_step
from llama_jax.types import LMBatch
from tests import toy

ROWS, LENGTH = 2, 64
WHOLE = jnp.ones((ROWS, LENGTH), jnp.int32)


def updates(size: int, **knobs):
    """Metrics and gradients of the real step on a packed batch and on one of whole rows, one document each."""
    partitioner = Partitioner(make_mesh({'context': size}, jax.devices()[:size]))
    model = toy.make_model(partitioner=partitioner, **knobs)
    target = abstract_state(*abstract_params_and_axes(model), toy.KEEP_GRADIENTS, partitioner)
    start = functools.partial(new_state, tx=toy.KEEP_GRADIENTS)
    packed = toy.packed_batch(ROWS, LENGTH)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), WHOLE.shape)
    whole = packed.replace(positions=positions, segment_ids=WHOLE, loss_mask=WHOLE.astype(bool))
    step = compile_train_step(target, loss_fn=language_model_loss(model, num_chunks=2), tx=toy.KEEP_GRADIENTS)
    found = []
    with jax.set_mesh(partitioner.mesh):
        for batch in (packed, whole):
            state = jax.device_put(start(toy.make_params(toy.make_model())), shardings_of(target))
            batch = jax.device_put(batch, partitioner.batch_sharding(ROWS, LENGTH))
            state, metrics = step(state, {}, batch, jax.random.key(0))
            found.append(jax.device_get((metrics, state.opt_state)))
    return found


@pytest.fixture(scope='module')
def whole_rows():
    return updates(1)


@pytest.mark.parametrize(
    ('size', 'remat'),
    [
        pytest.param(2, 'none', marks=pytest.mark.slow),
        pytest.param(4, 'attention', marks=pytest.mark.slow),
        (8, 'full_offload'),
    ],
)
def test_split_rows_give_the_loss_and_gradients_of_whole_ones(whole_rows, size, remat):
    for (metrics, gradients), (wanted_metrics, wanted) in zip(
        updates(size, remat=remat), whole_rows, strict=True
    ):
        for name, value in wanted_metrics.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5), name
        toy.assert_same_gradients(gradients, wanted)


def test_memory_of_a_step_falls_with_the_devices_that_share_a_row():
    """131,072 tokens; keys and values, which are gathered whole, are an eighth of the queries as in Llama 3 70B."""
    length = 131_072
    config = LlamaConfig(
        vocab_size=256, embed_dim=128, mlp_dim=512, num_layers=2, num_heads=8, num_kv_heads=1, head_dim=16,
        max_seq_len=length,
    )  # fmt: skip

    def temporary_bytes(size: int) -> int:
        partitioner = Partitioner(make_mesh({'context': size}, jax.devices()[:size]))
        model = LlamaForCausalLM(config, dtype=jnp.float32, remat='full', partitioner=partitioner)
        tx = make_optimizer(OptimizerConfig(), 1e-3)
        state = abstract_state(*abstract_params_and_axes(model), tx, partitioner)
        step = compile_train_step(state, loss_fn=language_model_loss(model, num_chunks=8), tx=tx)
        sharding = partitioner.batch_sharding(1, length)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)
        mask = jax.ShapeDtypeStruct((1, length), jnp.bool_, sharding=sharding)
        with jax.set_mesh(partitioner.mesh):
            compiled = step.lower(state, {}, LMBatch(ids, ids, ids, ids, mask), jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1) > 0.85 * 8 * temporary_bytes(8)


def test_generation_with_split_rows_is_refused_in_one_line():
    model = toy.make_model(partitioner=Partitioner(make_mesh({'data': 4, 'context': 2})))
    cache = jax.eval_shape(lambda: KVCache.create(toy.CONFIG, 4, 16, jnp.float32))
    with pytest.raises(InputError, match='use a mesh with context=1'):
        jax.eval_shape(
            lambda cache: model.apply(
                {'params': toy.make_params(model)}, jnp.zeros((4, 8), jnp.int32), cache=cache
            ),
            cache,
        )
