import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.models.llama import LlamaForCausalLM, abstract_params, init_params, param_axes
from llama_jax.models.presets import PRESETS
from llama_jax.models.reward import LlamaForRewardModel, model_of
from tests import toy

CONFIG = dataclasses.replace(toy.CONFIG, scalar_head=True)


def test_its_weights_are_the_trunks_and_a_score():
    model = LlamaForRewardModel(CONFIG)
    shapes, policy = abstract_params(model), abstract_params(LlamaForCausalLM(toy.CONFIG))
    assert shapes.pop('score').shape == (CONFIG.embed_dim,)
    policy.pop('head')
    assert shapes == policy
    assert param_axes(model)['score'] == ('embed',)


@pytest.mark.parametrize('name', ['llama2_7b', 'llama3_2_1b'])
def test_weights_are_counted(name):
    config = dataclasses.replace(PRESETS[name], scalar_head=True)
    shapes = jax.tree.leaves(abstract_params(model_of(config)))
    assert sum(np.prod(leaf.shape, dtype=int) for leaf in shapes) == config.num_params


def test_the_first_scores_have_a_variance_near_one():
    """The head's deviation is 1 / sqrt(D + 1), and what it multiplies is normalised."""
    config = dataclasses.replace(CONFIG, embed_dim=512)
    score = jax.jit(lambda key: init_params(LlamaForRewardModel(config), key))(jax.random.key(1))['score']
    assert float(jnp.std(score)) == pytest.approx(513**-0.5, rel=0.15)  # of 512 draws: 3 % is usual


def test_a_score_is_the_heads_product_with_the_hidden_state():
    model = LlamaForRewardModel(CONFIG, dtype=jnp.float32)
    params = toy.make_params(model)
    batch = toy.packed_batch(2, 12)
    arguments = batch.tokens, batch.positions, batch.segment_ids
    scores = jax.jit(lambda p: model.apply({'params': p}, *arguments))(params)
    hidden, _ = jax.jit(lambda p: model.apply({'params': p}, *arguments, method='hidden'))(params)
    np.testing.assert_allclose(
        scores, np.asarray(hidden, float) @ np.asarray(params['score'], float), atol=1e-5
    )
    assert scores.dtype == jnp.float32


def test_one_kind_is_not_taken_for_the_other():
    with pytest.raises(InputError, match='this is a language model, which gives no scores'):
        abstract_params(LlamaForRewardModel(toy.CONFIG))
    with pytest.raises(InputError, match='this is a reward model, which gives scores and no text'):
        abstract_params(LlamaForCausalLM(CONFIG))
