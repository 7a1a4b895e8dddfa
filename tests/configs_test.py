"""Every configuration loads, explains its keys, and says what the papers say."""

import importlib.util
import pathlib
import re

import pytest

from configs import pretrain, sections, sft
from experiments import config_file, settings
from llama_jax.models.presets import PRESETS
from llama_jax.train.optimizer import make_schedule
from llama_jax.types import InputError

CONFIGS = pathlib.Path(pretrain.__file__).parent


def flat(config) -> dict:
    return config_file.flatten(config)


@pytest.mark.parametrize('model', sorted(PRESETS))
def test_every_preset_has_a_recipe_that_fits_it(model):
    config = pretrain.get_config(model)
    assert config.model.preset == model
    preset = settings.find_preset(model)
    assert config.data.seq_len <= preset.max_seq_len
    assert config.data.seq_len % config.train.loss_chunks == 0
    optimizer = settings.make_optimizer_config(config)
    schedule = make_schedule(optimizer, config.train.num_steps)
    assert float(schedule(config.train.num_steps - 1)) == pytest.approx(
        optimizer.learning_rate * optimizer.final_fraction, rel=1e-5
    )


# Tokens of a batch, peak learning rate, tokens in all: LLaMA paper Table 2, Llama 2 paper Table 1, Llama 3 paper
# section 3.4 and Table 4.
@pytest.mark.parametrize(
    ('model', 'batch_tokens', 'learning_rate', 'total_tokens'),
    [
        ('llama_7b', 4 << 20, 3e-4, 1.0e12),
        ('llama_65b', 4 << 20, 1.5e-4, 1.4e12),
        ('llama2_7b', 4 << 20, 3e-4, 2.0e12),
        ('llama2_70b', 4 << 20, 1.5e-4, 2.0e12),
        ('code_llama_34b', 4 << 20, 1.5e-4, 0.5e12),
        ('llama3_1_405b', 16 << 20, 8e-5, None),
        ('llama3_8b', 16 << 20, 3e-4, None),
    ],
)
def test_recipes_are_the_papers(model, batch_tokens, learning_rate, total_tokens):
    config = pretrain.get_config(model)
    tokens = config.train.batch_size * config.data.seq_len
    assert tokens == batch_tokens
    assert config.optimizer.learning_rate == learning_rate
    if total_tokens:
        # To one step: the papers give whole trillions.
        assert config.train.num_steps * tokens == pytest.approx(total_tokens, abs=tokens)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)


def test_the_mixture_is_llamas():
    config = pretrain.get_config('llama_7b')
    assert [float(w) for w in config.data.weights.split(',')] == [67, 15, 4.5, 4.5, 4.5, 2.5, 2]
    assert len(config.data.train.split(',')) == 7


TASKS = sorted({*CONFIGS.glob('[a-z]*.py')} - {CONFIGS / 'sections.py'})


@pytest.mark.parametrize('file', TASKS, ids=lambda path: path.name)
def test_fewer_than_60_keys(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(flat(module.get_config())) < 60


def test_every_key_is_explained():
    """Of what all configurations share; what a task sets otherwise is the recipe's."""
    explained = set()
    for line in pathlib.Path(sections.__file__).read_text().splitlines():
        if key := re.match(r'    (?:section|config\.\w+)\.(\w+) = (?!\w+\()', line):
            # A name that is the usual symbol of its paper needs no more words.
            assert '#' in line or key[1] in ('beta1', 'beta2', 'tensorboard'), f'{key[1]} is not explained'
            explained.add(key[1])
    known = (
        flat(sections.all_of('tiny'))
        | flat(sections.fine_tuning('tiny'))
        | flat(sections.preferences('tiny'))
    )
    assert explained == {key.partition('.')[2] for key in known} - {''}


def test_recipes_of_fine_tuning_are_the_papers():
    """Llama 2 paper, section 3.1; Stanford Alpaca, README; Tulu 2 paper."""
    published = {
        'llama2_7b': {
            'optimizer.learning_rate': 2e-5, 'optimizer.weight_decay': 0.1, 'train.batch_size': 64,
            'data.seq_len': 4096, 'train.num_epochs': 2,
        },
        'llama2_7b,alpaca': {
            'optimizer.learning_rate': 2e-5, 'optimizer.weight_decay': 0, 'train.batch_size': 128, 'data.seq_len': 512,
            'train.num_epochs': 3,
        },
        'llama2_7b,alpaca_lora': {
            'lora.rank': 8, 'lora.alpha': 16, 'lora.dropout': 0.05, 'lora.targets': 'q,v', 'train.batch_size': 128,
            'optimizer.learning_rate': 3e-4, 'train.num_epochs': 3, 'data.seq_len': 256,
        },
        'llama2_7b,guanaco': {
            'lora.rank': 64, 'lora.alpha': 16, 'lora.dropout': 0.1, 'lora.targets': 'all', 'model.weights': 'nf4',
            'train.num_steps': 1875, 'train.batch_size': 16, 'optimizer.learning_rate': 2e-4,
            'optimizer.clip_norm': 0.3,
        },
        'llama2_70b,tulu2': {'optimizer.learning_rate': 1e-5, 'train.batch_size': 128, 'train.num_epochs': 2},
    }  # fmt: skip
    for argument, values in published.items():
        config = sft.get_config(argument)
        settings.check_settings(config)
        settings.check_sizes(
            config, PRESETS[config.model.preset].max_seq_len, settings.make_partitioner(config)
        )
        found = flat(config)
        assert {key: found[key] for key in values} == values
    config.train.num_steps = 10
    with pytest.raises(InputError, match='num_steps=10 and --config.train.num_epochs=2.0 are both given'):
        settings.check_settings(config)
    config.train.num_steps, config.train.num_epochs = 0, 0
    with pytest.raises(InputError, match='--config.train.num_steps=0 is out of range'):
        settings.check_settings(config)
