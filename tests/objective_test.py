"""What objectives cost, of which MFU is a share, and what the rows of tokens begin with that no base has read."""

import dataclasses
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run.objective import objective_of
from experiments.run.settings import make_model
from experiments.run.untrained_tokens import with_trained_tokens
from llama_jax.models.presets import PRESETS
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.tokenizer.chat_format import Llama3ChatFormat
from llama_jax.train.throughput import training_flops_per_token
from tests import toy

T = 128


@pytest.mark.parametrize(
    ('recipe', 'settings', 'trained', 'scored', 'read'),
    [
        ('pretrain:tiny', {}, 1, 0, 0),
        ('reward_model:tiny', {}, 0, 1, 0),
        ('dpo:tiny', {'loss.reference': 'live'}, 1, 0, 1),
        ('dpo:tiny', {'loss.reference': 'kept'}, 1, 0, 0),
        ('dpo:tiny', {'loss.kind': 'simpo'}, 1, 0, 0),
        ('dpo:tiny,kto', {'loss.reference': 'live'}, 1, 0, 3),  # two of them in the pass before
        ('ppo:tiny', {}, 1, 1, 0),
        ('grpo:tiny', {}, 1, 0, 0),
    ],
)
def test_a_token_costs_what_all_models_do_that_it_goes_through(recipe, settings, trained, scored, read):
    name, _, argument = recipe.partition(':')
    config = importlib.import_module(f'configs.{name}').get_config(argument)
    config.update_from_flattened_dict(settings | {'data.seq_len': 1024, 'train.batch_size': 8})
    llama = PRESETS['tiny']
    partitioner = Partitioner(make_mesh({}, jax.devices()[:1]))
    objective = objective_of(config, make_model(config, llama, partitioner), partitioner)
    whole = training_flops_per_token(llama, T)[1]
    head = 6 * llama.vocab_size * llama.embed_dim
    of_score = whole - head + 6 * llama.embed_dim
    expected = trained * whole + scored * of_score + read * whole / 3
    assert objective.flops_per_token(T, and_before=True)[1] == pytest.approx(expected, rel=1e-12)


def test_of_a_frozen_base_no_gradient_is_counted():
    llama = dataclasses.replace(PRESETS['tiny'], scalar_head=True)
    weights = (
        llama.num_params - llama.vocab_size * llama.embed_dim - (2 * llama.num_layers + 1) * llama.embed_dim
    )
    whole, beside = (training_flops_per_token(llama, T, frozen)[0] for frozen in (False, True))
    assert whole - beside == 2 * weights


@pytest.mark.slow
def test_special_tokens_that_a_base_never_read_are_told_and_begin_as_the_mean(caplog):
    """Where the tables are trained; beside frozen ones a line says how to train them."""
    caplog.set_level('INFO')
    special = {
        name: 40 + number
        for number, name in enumerate(('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'))
    }
    tokenizer = types.SimpleNamespace(special_tokens=special)
    params = toy.make_params(toy.make_model())
    for name in ('embed', 'head'):
        params[name] = params[name].at[jnp.array([40, 42])].multiply(1e-4)
    config = importlib.import_module('configs.sft').get_config('tiny')
    config.update_from_flattened_dict({'data.seq_len': 16, 'train.batch_size': 8, 'train.loss_chunks': 2})
    partitioner = Partitioner(make_mesh({}, jax.devices()[:1]))
    objective = objective_of(config, toy.make_model(partitioner=partitioner), partitioner)
    objective = dataclasses.replace(objective, first_params=lambda target: jax.tree.map(jnp.copy, params))
    chat = object.__new__(Llama3ChatFormat)  # as there is one
    first = with_trained_tokens(objective, chat, tokenizer).first_params(objective.params)
    np.testing.assert_allclose(first['head'][42], params['head'].mean(0), atol=1e-6)
    np.testing.assert_array_equal(first['embed'][41], params['embed'][41])
    assert (
        'the base never read <|start_header_id|> <|eot_id|>: their rows begin as the mean of all'
        in caplog.text
    )
    with_trained_tokens(dataclasses.replace(objective, frozen=params), chat, tokenizer)
    assert (
        '<|eot_id|>, which this format needs, and its tables are frozen; train them by --config.lora'
        in caplog.text
    )
    assert with_trained_tokens(objective, object(), tokenizer) is objective
