"""Every configuration loads, explains its keys, and says what the papers say."""

import importlib.util
import pathlib
import re

import pytest

from configs import dpo, grpo, ppo, pretrain, reward_model, sections, sft
from experiments.policy import objective as policy
from experiments.run import config_file, settings
from llama_jax.errors import InputError
from llama_jax.eval.published import published_scores
from llama_jax.losses.policy import PRESETS as PRESETS_OF_POLICIES
from llama_jax.models.presets import PRESETS
from llama_jax.train.optimizer import make_schedule

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
        | flat(sections.policies('tiny'))
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


def test_recipes_of_policy_gradients_are_the_papers():
    """Llama 2 paper, section 3.2.3."""
    published = {
        'rollout.batch_size': 512, 'train.batch_size': 64, 'algorithm.name': 'ppo', 'optimizer.learning_rate': 1e-6,
        'optimizer.final_fraction': 1.0, 'optimizer.warmup_steps': 0, 'optimizer.beta1': 0.9, 'optimizer.beta2': 0.95,
        'optimizer.eps': 1e-5, 'optimizer.weight_decay': 0.1, 'optimizer.clip_norm': 1.0,
    }  # fmt: skip
    betas = {'llama2_7b': 0.01, 'llama2_13b': 0.01, 'llama2_34b': 0.005, 'llama2_70b': 0.005}
    for model, beta in betas.items():
        found = flat(ppo.get_config(model))
        assert {key: found[key] for key in published} == published and found['algorithm.beta'] == beta
        assert 200 <= found['train.num_steps'] * 64 / 512 <= 400
    assert policy.recipe_of(ppo.get_config()).algorithm.clip_low == 0.2
    for kind in grpo._KNOWN:
        recipe = policy.check_policy(grpo.get_config(f'llama3_1_8b,{kind}'))
        assert recipe.algorithm == PRESETS_OF_POLICIES[kind]


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'algorithm.name': 'grop'}, "unknown algorithm 'grop'; did you mean grpo"),
        ({'algorithm.name': 'rloo'}, 'rollout.samples=1, and the advantage leave_one_out'),
        ({'algorithm.name': 'grpo'}, 'rollout.samples=1, and the advantage group_std'),
        ({'algorithm.constants': 'divergence=k1'}, "divergence is 'k1': in the loss"),
        ({'algorithm.constants': 'top_p=0.9'}, "constants has 'top_p=0.9'"),
        ({'algorithm.constants': 'whiten=maybe'}, "constants has whiten='maybe'; it must be of type bool"),
        ({'algorithm.constants': 'epochs=0'}, 'epochs is 0; it must be at least 1'),
        ({'rollout.batch_size': 60}, 'batch_size=60 answers do not divide into --config.train.batch_size=64'),
        ({'rollout.samples': 5}, 'batch_size=512 answers do not divide into --config.rollout.samples=5'),
        ({'rollout.temperature': 0.0}, 'rollout.temperature=0.0; it must be above 0'),
        ({'rollout.max_new_tokens': 4096}, 'max_new_tokens=4096 leaves no room for a prompt'),
        ({'rollout.mesh': 'tensor=3'}, 'rollout.mesh'),
        ({'algorithm.name': 'reinforce', 'algorithm.values_from': 'x'}, 'values_from=x, and --config.algorithm.name'),
    ],
)  # fmt: skip
def test_policy_gradients_that_make_no_sense_are_refused(overrides, message):
    config = ppo.get_config()
    config.update_from_flattened_dict(overrides)
    training = settings.make_partitioner(config)
    with pytest.raises(InputError, match=re.escape(message)):
        _ = policy.check_policy(config), policy.sampler_partitioner(config, training)


@pytest.mark.parametrize('key', ['top_p', 'top_k', 'min_new_tokens'])
def test_a_policy_is_drawn_from_its_whole_distribution(key):
    """What the sampler would cut away the ratio would still count: there are no such keys."""
    argv = ['--config=configs/ppo.py:tiny', f'--config.rollout.{key}=1']
    assert f'unknown config key --config.rollout.{key}; ' in config_file.describe_error(KeyError(key), argv)


def recipes():
    """(name, what it says of itself) of each recipe: functions of pretrain and sft, files of the others."""
    for module in (pretrain, sft):
        for name, recipe in module._RECIPES.items():
            yield f'{module.__name__}:{name}', recipe.__doc__ or ''
    for module in (dpo, grpo, ppo, reward_model):
        yield module.__name__, module.__doc__ or ''


def test_every_recipe_says_what_to_expect_and_whence_that_is():
    for name, text in recipes():
        assert 'Expect' in text, name
        said = text[text.index('Expect') :]
        assert re.search(r'[Pp]aper|README|card|et al|stanford', said), name
        assert re.search(r'\d|minutes|hours', said), name


def test_the_scores_that_are_expected_are_those_of_the_published_tables():
    families = {
        'llama': ['llama_7b', 'llama_13b', 'llama_33b', 'llama_65b'],
        'llama2': ['llama2_7b', 'llama2_13b', 'llama2_34b', 'llama2_70b'],
        'llama3': [
            'llama3_8b', 'llama3_70b', 'llama3_1_8b', 'llama3_1_70b', 'llama3_1_405b', 'llama3_2_1b', 'llama3_2_3b',
        ],
    }  # fmt: skip
    for family, models in families.items():
        said = re.search(r'MMLU with five examples[^:]*: ([\d., ;]+) %', pretrain._RECIPES[family].__doc__)
        found = [float(value) for value in re.findall(r'[\d.]+', said[1])]
        metric = 'acc_macro' if family == 'llama3' else 'acc'
        assert len(found) == len(models)
        for model, value in zip(models, found, strict=True):
            known = [s.value for s in published_scores(model) if (s.task, s.metric) == ('mmlu', metric)]
            assert value / 100 in [pytest.approx(score) for score in known], model
