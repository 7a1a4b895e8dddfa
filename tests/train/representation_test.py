"""A weight that is kept as something else than one array: nothing but `ops.linear` may look inside it.

The representation is a toy, a frozen-looking base with a correction that is added; what holds for it (model, loss,
optimisers, placement, checkpoints) holds for any, whatever the objective.
"""

import contextlib
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from llama_jax.checkpoint.training import Checkpointer
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import abstract_params_and_axes
from llama_jax.ops import linear
from llama_jax.ops.cross_entropy import token_log_probabilities
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.optimizer import OPTIMIZERS, OptimizerConfig, decayed, make_optimizer
from llama_jax.train.state import abstract_state, new_state, shardings_of
from llama_jax.train.step import compile_train_step, train_step
from tests import toy


@flax.struct.dataclass
class Corrected:
    """base + scale * correction, the scale one number a layer: leaves of two shapes."""

    base: Float[Array, '...']
    correction: Float[Array, '...']
    scale: Float[Array, '...']

    def materialize(self):
        scale = self.scale.reshape(self.scale.shape + (1,) * (self.base.ndim - self.scale.ndim))
        return self.base + scale * self.correction

    def einsum(self, equation, x, output_dtype):
        return linear.einsum(equation, x, self.materialize(), output_dtype)

    def take(self, rows, dtype, partitioner):
        return linear.take(self.materialize(), rows, dtype, partitioner)


def corrected(params, of_leaf):
    """The params with every weight but the norms' in the toy's form; `of_leaf` makes its three fields."""
    return jax.tree.map(
        lambda leaf, is_matrix: Corrected(*of_leaf(leaf)) if is_matrix else leaf, params, decayed(params)
    )


def split(weight):
    """An exact half and the other: their sum is the weight, bit for bit."""
    scale = jnp.full(weight.shape[:1] if weight.ndim > 2 else (), 0.5)
    return weight / 2, weight, scale


@pytest.fixture(scope='module')
def model():
    return toy.make_model(partitioner=Partitioner(make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})))


@pytest.fixture(scope='module')
def plain():
    return toy.make_params(toy.make_model())


def abstract_and_axes(model):
    shapes, axes = abstract_params_and_axes(model)

    def of_axes(shape, own, is_matrix):
        return Corrected(own, own, own[:1] if shape.ndim > 2 else ()) if is_matrix else own

    abstract = jax.eval_shape(lambda: corrected(jax.tree.map(lambda s: jnp.zeros(s.shape), shapes), split))
    return abstract, jax.tree.map(of_axes, shapes, axes, decayed(shapes))


def test_the_model_and_the_losses_take_it_for_the_weight(plain):
    model, batch = toy.make_model(), toy.packed_batch(4, 16)
    own = corrected(plain, split)
    apply, loss_fn = jax.jit(model.apply), jax.jit(language_model_loss(model, num_chunks=2))
    np.testing.assert_array_equal(*(apply({'params': p}, batch.tokens)[0] for p in (plain, own)))
    losses = [loss_fn(p, {}, batch, jax.random.key(0))[0] for p in (plain, own)]
    assert losses[0] == losses[1]
    hidden = jax.random.normal(jax.random.key(1), (4, 16, toy.CONFIG.embed_dim))
    head = [p['head'] for p in (plain, own)]
    np.testing.assert_array_equal(*(token_log_probabilities(hidden, h, batch.targets, 2) for h in head))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_takes_its_leaves(name, model):
    tx = make_optimizer(OptimizerConfig(name=name), 1e-2)
    target = abstract_state(*abstract_and_axes(model), tx, model.partitioner)
    after, _ = jax.eval_shape(
        functools.partial(train_step, loss_fn=language_model_loss(toy.make_model()), tx=tx),
        target, {}, toy.packed_batch(4, 16), jax.random.key(0),
    )  # fmt: skip
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, target)


def test_a_step_trains_places_and_saves_its_leaves(model, plain, tmp_path):
    tx = make_optimizer(OptimizerConfig(), 1e-2)
    target = abstract_state(*abstract_and_axes(model), tx, model.partitioner)
    q = target.params['blocks']['attention']['q'].base
    moments = [leaf for leaf in jax.tree.leaves(target.opt_state) if leaf.shape == q.shape]
    assert len(moments) == 4 and all(leaf.sharding == q.sharding for leaf in moments)
    start = jax.jit(lambda p: new_state(corrected(p, split), tx), out_shardings=shardings_of(target))
    step = compile_train_step(target, loss_fn=language_model_loss(model), tx=tx)
    batch = jax.device_put(toy.packed_batch(4, 16), model.partitioner.batch_sharding(4, 16))
    with jax.set_mesh(model.partitioner.mesh):
        state = start(plain)
        before = jax.device_get(state.params)
        state, metrics = step(state, {}, batch, jax.random.key(0))
    assert np.isfinite(metrics['loss'])
    shards = state.params['blocks']['attention']['q'].correction.addressable_shards
    assert {shard.data.shape for shard in shards} == {(3, 16, 4, 8)}  # of (3, 32, 8, 8)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
    assert all(jax.tree.leaves(changed)), changed
    with contextlib.closing(Checkpointer(tmp_path / 'checkpoints')) as checkpointer:
        checkpointer.save(1, state, {})
        checkpointer.wait()
        _, restored, _ = checkpointer.restore_latest(target)
    jax.tree.map(np.testing.assert_array_equal, state, restored)
