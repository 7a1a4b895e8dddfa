"""What a token of each objective costs, of which MFU is a share: every model that a batch goes through is counted."""

import dataclasses
import importlib

import jax
import pytest

from experiments.run.objective import objective_of
from experiments.run.settings import make_model
from llama_jax.models.presets import PRESETS
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.throughput import training_flops_per_token

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
