"""Policies trained on their own answers by the command: where training ends, resuming, what is refused."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.rl.iteration import Iteration
from tests.command_line import saved_steps, tiny_run

BETA = 0.5
REWARD = """
def score(prompt, answer, record):
    return (sum(map(ord, answer)) % 7) / 6
"""


def worth(answer: str) -> float:
    return (sum(map(ord, answer)) % 7) / 6


@pytest.fixture(scope='module')
def base(commands, folder, corpus) -> pathlib.Path:
    """A language model of a few steps."""
    commands.run('pretrain', *tiny_run(folder / 'base', corpus, train__num_steps=12)).succeeded()
    return folder / 'base'


@pytest.fixture(scope='module')
def prompts(folder) -> pathlib.Path:
    (folder / 'reward.py').write_text(REWARD)
    file = folder / 'prompts.jsonl'
    file.write_text(
        ''.join(json.dumps({'prompt': f'ba {word}'}) + '\n' for word in ('dio', 'fa', 'ku', 'gilly'))
    )
    return file


def arguments(workdir, base, prompts, recipe='ppo.py:nano', **overrides) -> list[str]:
    config = {
        'data__train': prompts, 'data__format': 'plain', 'data__seq_len': 64, 'data__validation_fraction': 0.0,
        'model__dtype': 'float32', 'model__vocab_size': 320, 'rollout__batch_size': 16, 'rollout__max_new_tokens': 6,
        'rollout__slots': 8, 'train__batch_size': 8, 'train__num_steps': 4, 'optimizer__learning_rate': 1e-3,
        'algorithm__rewards': f'{prompts.parent / "reward.py"}:score,missing_stop=0.5', 'checkpoint__every': 2,
        'log__every': 1, 'log__tensorboard': False, 'eval__every': 2,
    } | overrides  # fmt: skip
    return [
        f'--config=configs/{recipe}', f'--workdir={workdir}', f'--checkpoint={base}',
        *(f'--config.{key.replace("__", ".")}={value}' for key, value in config.items()),
    ]  # fmt: skip


def logged(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def law(workdir, prompt: str):
    """(the distribution of the first token of an answer, what each is worth)."""
    config, params, tokenizer = llama_jax.load(workdir)
    assert tokenizer is not None
    ids = tokenizer.encode(prompt, bos=True)
    logits, _ = llama_jax.LlamaForCausalLM(config, dtype='float32').apply(
        {'params': params}, jnp.array([ids])
    )
    logits = np.asarray(logits[0, -1], np.float64)
    p = np.exp(logits - logits.max())
    return p / p.sum(), tokenizer


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['ppo.py:nano', 'grpo.py:nano'])
def test_a_policy_is_trained_and_resumes_within_an_iteration(commands, folder, base, prompts, recipe):
    name = recipe.partition('.')[0]
    options = {'recipe': recipe, 'data__validation': prompts}
    whole, broken = folder / f'{name}_whole', folder / f'{name}_broken'
    shown = commands.run('ppo', *arguments(whole, base, prompts, **options)).succeeded()
    assert 'reward' in shown.stdout
    commands.run('ppo', *arguments(broken, base, prompts, **options, train__num_steps=3)).succeeded()
    assert saved_steps(broken) == [2, 3]  # the last is within an iteration
    commands.run('ppo', *arguments(broken, base, prompts, **options)).succeeded()
    lines, again = logged(whole), logged(broken)
    assert [line['step'] for line in lines] == [1, 2, 3, 4]
    times = ('tokens_per', 'mfu', 'share_', 'data_wait')
    for one, other in zip(lines, again, strict=True):
        for key in one.keys() - {'learning_rate'}:
            if not key.startswith(times) and (one['step'], key) != (3, 'held'):
                assert other[key] == one[key], (one['step'], key)
    first, last = lines[0], lines[-1]
    assert first['ratio_gap'] < 1e-5 and first['clipped_low'] == first['clipped_high'] == 0
    assert abs(first['k1']) < 1e-6
    assert {'reward', 'kl', 'sampler_gap', 'held_out_reward', 'share_rollout', 'stopped'} <= last.keys()
    assert last['sampler_gap_max'] < 1e-4
    assert (whole / 'reward_over_kl.png').stat().st_size and (whole / 'samples').is_dir()
    iteration = Iteration.from_bytes((whole / 'rollouts/00000002.npz').read_bytes())
    assert len(iteration.answers) == 16
    commands.run('generate', f'--checkpoint={whole}', '--prompt=ba', '--max_new_tokens=2').succeeded()


# ---- where training ends

ALGORITHMS = {
    'ppo': ('ppo.py:nano', 'whiten=false,trace=1'),
    'reinforce': ('grpo.py:nano,reinforce', ''),
    'rloo': ('grpo.py:nano,rloo', ''),
    'k2': ('grpo.py:nano,dr_grpo', 'divergence=k2,weights=sequence'),
    'k3': ('grpo.py:nano,dr_grpo', 'divergence=k3,weights=sequence'),
}


def ends(commands, folder, base, prompts, algorithm):
    """(distance to pi0 exp(r / beta) / Z, to beta pi0 / (lambda - r), of the base to the first) after training."""
    recipe, constants = ALGORITHMS[algorithm]
    one = folder / 'one.jsonl'
    one.write_text(json.dumps({'prompt': 'ba dio'}) + '\n')
    workdir = folder / f'closed_{algorithm}'
    settings = {
        'rollout__max_new_tokens': 1, 'rollout__batch_size': 256, 'rollout__samples': 256, 'rollout__slots': 256,
        'train__batch_size': 256, 'train__num_steps': 60, 'data__seq_len': 64, 'algorithm__beta': BETA,
        'algorithm__constants': constants, 'algorithm__rewards': f'{prompts.parent / "reward.py"}:score',
        'optimizer__learning_rate': 1e-2, 'optimizer__final_fraction': 0.0, 'optimizer__weight_decay': 0.0,
        'optimizer__beta2': 0.99, 'checkpoint__every': 60, 'eval__every': 0,
    }  # fmt: skip
    commands.run('ppo', *arguments(workdir, base, one, recipe, **settings)).succeeded()
    start, tokenizer = law(base, 'ba dio')
    ids = tokenizer.encode('ba dio', bos=True)
    texts = [tokenizer.decode([*ids, token])[len(tokenizer.decode(ids)) :] for token in range(len(start))]
    stops = (*tokenizer.stop_ids, tokenizer.eos_id)
    rewards = np.array([0.0 if token in stops else worth(text) for token, text in enumerate(texts)])
    tilted = start * np.exp(rewards / BETA)
    tilted /= tilted.sum()
    low, high = rewards.max() + 1e-9, rewards.max() + 10
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * start / (middle - rewards)).sum() > 1 else (low, middle)
    other, (end, _) = BETA * start / (high - rewards), law(workdir, 'ba dio')

    def distance(one, two):
        return 0.5 * float(np.abs(one - two).sum())

    lines = logged(workdir)
    print(algorithm, distance(end, tilted), distance(end, other), distance(start, tilted), distance(tilted, other),
          lines[0]['reward'], lines[-1]['reward'], lines[-1]['kl'])  # fmt: skip
    return distance(end, tilted), distance(end, other), distance(start, tilted)


@pytest.mark.long
@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_training_ends_where_the_divergence_says(commands, folder, base, prompts, algorithm):
    to_tilted, to_other, moved = ends(commands, folder, base, prompts, algorithm)
    assert moved > 0.2
    if algorithm == 'k3':
        assert to_other < 0.05 and to_other < to_tilted
    else:
        assert to_tilted < 0.05 and to_tilted < to_other


@pytest.mark.slow
@pytest.mark.parametrize(
    ('weights', 'temperature', 'mesh'),
    [('nf4', 0.7, {})],
)
def test_adapters_begin_at_their_base_and_move(commands, folder, base, prompts, weights, temperature, mesh):
    """Policy, reference and values beside one base; drawn on the same mesh or another."""
    workdir = folder / f'lora_{weights}'
    run = arguments(
        workdir, base, prompts, lora__rank=4, model__weights=weights, rollout__temperature=temperature,
        algorithm__constants='epochs=2', train__num_steps=4, **mesh,
    )  # fmt: skip
    commands.run('ppo', *run, num_devices=4 if mesh else 1).succeeded()
    first, *_, last = logged(workdir)
    assert first['ratio_gap'] < 1e-5 and first['clipped_low'] == first['clipped_high'] == 0
    assert abs(first['k1']) < 1e-6 and abs(first['k3']) < 1e-6
    assert last['ratio_gap'] > 1e-4 and last['k3'] > 0
    assert last['sampler_gap'] < 1e-4
    shown = commands.run('generate', f'--checkpoint={workdir}', '--prompt=ba', '--max_new_tokens=2')
    shown.succeeded()


@pytest.mark.slow
def test_preflight_compiles_the_update(commands):
    shown = commands.run(
        'preflight', '--config=configs/ppo.py:nano', '--topology=v5e:2x2', '--config.data.seq_len=128',
        '--config.data.tokenizer=', '--config.model.vocab_size=512',
    ).succeeded()  # fmt: skip
    assert 'fits' in shown.stdout


REFUSED = {
    'no score': ({'algorithm__rewards': 'BASE'}, 'has no score: it is a language model'),
    'no values': ({'algorithm__values_from': 'BASE'}, 'is a language model, which has no score'),
    'no room': (
        {'data__seq_len': 8},
        '4 of 4 prompts are longer than 3 tokens, which is the context of 9 less max_new_tokens, 6',
    ),
    'no variance': (
        {'recipe': 'grpo.py:nano,dapo', 'algorithm__rewards': 'missing_stop=0', 'rollout__max_new_tokens': 1},
        '10 times others were drawn, and still',
    ),
    'another sampler': ({'rollout__mesh': 'tensor=3'}, 'tensor=3'),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', REFUSED)
def test_what_is_wrong_is_told_in_a_line(commands, folder, base, prompts, case):
    overrides, message = REFUSED[case]
    overrides = {key: str(base) if value == 'BASE' else value for key, value in overrides.items()}
    run = arguments(folder / f'refused_{case.replace(" ", "_")}', base, prompts, **overrides)
    assert message in commands.run('ppo', *run).error()


@pytest.mark.slow
def test_a_run_is_not_gone_on_with_otherwise(commands, folder, base, prompts):
    workdir = folder / 'fixed'
    commands.run('ppo', *arguments(workdir, base, prompts, train__num_steps=1)).succeeded()
    for key, value in {
        'algorithm__name': 'reinforce', 'algorithm__rewards': 'missing_stop', 'rollout__samples': 2
    }.items():  # fmt: skip
        error = commands.run('ppo', *arguments(workdir, base, prompts, **{key: value})).error()
        assert f'--config.{key.replace("__", ".")} was' in error
