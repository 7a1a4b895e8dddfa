import jax
import numpy as np
import pytest

from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import abstract_params_and_axes, init_params
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama_jax.train.state import abstract_state, new_state, shardings_of
from llama_jax.train.step import compile_train_step
from tests import toy


@pytest.fixture(scope='module')
def tx():
    return make_optimizer(OptimizerConfig(), 1e-3)


@pytest.fixture(scope='module')
def model():
    return toy.make_model(partitioner=Partitioner(make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})))


@pytest.fixture(scope='module')
def target(model, tx):
    return abstract_state(*abstract_params_and_axes(model), tx, model.partitioner)


def make_state(model, tx, target):
    return jax.jit(lambda key: new_state(init_params(model, key), tx), out_shardings=shardings_of(target))(
        jax.random.key(0)
    )


def assert_placed(state, target):
    same = jax.tree.map(lambda x, want: x.sharding.is_equivalent_to(want.sharding, x.ndim), state, target)
    assert jax.tree.all(same), same


def test_a_state_is_born_with_its_shardings_and_the_weights_of_one_device(model, tx, target):
    state = make_state(model, tx, target)
    assert_placed(state, target)
    q = state.params['blocks']['attention']['q']
    assert {shard.data.shape for shard in q.addressable_shards} == {(3, 16, 4, 8)}  # of (3, 32, 8, 8)
    alone = jax.jit(lambda key: new_state(init_params(model, key), tx))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state, alone)


def test_a_step_keeps_the_shardings_and_takes_the_buffers(model, tx, target):
    state = make_state(model, tx, target)
    step = compile_train_step(target, loss_fn=language_model_loss(model), tx=tx)
    sharding = model.partitioner.batch_sharding(4, 16)
    batch = jax.device_put(toy.packed_batch(4, 16), sharding)
    with jax.set_mesh(model.partitioner.mesh):
        after, metrics = step(state, {}, batch, jax.random.key(0))
    assert_placed(after, target)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
    assert after.step == 1 and np.isfinite(metrics['loss'])


def test_given_weights_start_with_a_new_optimizer(tx):
    params = toy.make_params(toy.make_model())
    state = new_state(params, tx)
    assert state.step == 0 and state.params is params
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
