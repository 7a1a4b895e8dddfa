"""Where training ends by the command, with answers of one token, beside what the place of the divergence says."""

import json
import pathlib

import numpy as np
import pytest

from tests.policy_runs import arguments, begin, law, logged, worth

BETA = 0.5
ALGORITHMS = {
    'ppo': ('ppo.py:nano', 'whiten=false,trace=1'),
    'reinforce': ('grpo.py:nano,reinforce', ''),
    'rloo': ('grpo.py:nano,rloo', ''),
    'k2': ('grpo.py:nano,dr_grpo', 'divergence=k2,weights=sequence'),
    'k3': ('grpo.py:nano,dr_grpo', 'divergence=k3,weights=sequence'),
}
# The embedding, which is the head, has an adapter too: behind one prompt all other weights move 320 logits in the 64
# directions that the head has.
ADAPTERS = {'lora__rank': 8, 'lora__targets': 'all,embed', 'model__weights': 'float32'}
MESH = {'mesh__fsdp': 2, 'mesh__tensor': 2}
# Of what is drawn, and so of the probabilities that the sampler says: a table in a file.
DISTURBED = """
import numpy
from llama_jax.inference.sampling import SamplerRows
undisturbed, table = SamplerRows.filter, numpy.load('TABLE')
SamplerRows.filter = lambda rows, logits: undisturbed(rows, logits + table[None])
"""


@pytest.fixture(scope='module')
def begun(commands, folder, corpus) -> tuple[pathlib.Path, pathlib.Path]:
    return begin(commands, folder, corpus)


def known(base):
    """(the distribution of the first token of an answer, what each is worth)."""
    start, tokenizer = law(base, 'ba dio')
    ids = tokenizer.encode('ba dio', bos=True)
    texts = [tokenizer.decode([*ids, token])[len(tokenizer.decode(ids)) :] for token in range(len(start))]
    stops = (*tokenizer.stop_ids, tokenizer.eos_id)
    return start, np.array([0.0 if token in stops else worth(text) for token, text in enumerate(texts)])


def ends(commands, folder, begun, algorithm, name='', *, constants='', num_devices=1, before='', **overrides):
    """Distances of the end to pi0 exp(r / beta) / Z, to beta pi0 / (lambda - r), and of the base to the first."""
    base, prompts = begun
    recipe, own = ALGORITHMS[algorithm]
    one = folder / 'one.jsonl'
    one.write_text(json.dumps({'prompt': 'ba dio'}) + '\n')
    workdir = folder / f'closed_{algorithm}{name}'
    settings = {
        'rollout__max_new_tokens': 1, 'rollout__batch_size': 256, 'rollout__samples': 256, 'rollout__slots': 256,
        'train__batch_size': 256, 'train__num_steps': 60, 'data__seq_len': 64, 'algorithm__beta': BETA,
        'algorithm__constants': ','.join(filter(None, (own, constants))),
        'algorithm__rewards': f'{prompts.parent / "reward.py"}:score', 'optimizer__learning_rate': 1e-2,
        'optimizer__final_fraction': 0.0, 'optimizer__weight_decay': 0.0, 'optimizer__beta2': 0.99,
        'checkpoint__every': 60, 'eval__every': 0,
    } | overrides  # fmt: skip
    run = arguments(workdir, base, one, recipe, **settings)
    commands.run('ppo', *run, num_devices=num_devices, before=before).succeeded()
    start, rewards = known(base)
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
    found = distance(end, tilted), distance(end, other), distance(start, tilted)
    print(
        f'{algorithm}{name}: {found[0]:.3f} to the first law, {found[1]:.3f} to the other, the base {found[2]:.3f}; '
        f'reward {lines[0]["reward"]:.3f} to {lines[-1]["reward"]:.3f}, kl {lines[-1].get("kl", 0):.3f}, '
        f'sampler gap {lines[-1]["sampler_gap"]:.2g}'
    )
    return found


@pytest.mark.long
@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_training_ends_where_the_divergence_says(commands, folder, begun, algorithm):
    to_tilted, to_other, moved = ends(commands, folder, begun, algorithm)
    assert moved > 0.2
    if algorithm == 'k3':
        assert to_other < 0.05 and to_other < to_tilted
    else:
        assert to_tilted < 0.05 and to_tilted < to_other


@pytest.mark.long
@pytest.mark.parametrize('kind', ['adapters', 'mesh', 'adapters_on_a_mesh'])
def test_so_it_does_with_adapters_and_on_a_mesh(commands, folder, begun, kind):
    overrides = (ADAPTERS if 'adapters' in kind else {}) | (MESH if 'mesh' in kind else {})
    to_tilted, to_other, _ = ends(
        commands, folder, begun, 'ppo', f'_{kind}', num_devices=4 if 'mesh' in kind else 1, **overrides
    )
    assert to_tilted < 0.05 and to_tilted < to_other


@pytest.mark.accelerator
def test_so_it_does_on_an_accelerator(commands, folder, begun):
    to_tilted, to_other, _ = ends(commands, folder, begun, 'ppo', '_accelerator', **ADAPTERS)
    assert to_tilted < 0.05 and to_tilted < to_other


@pytest.mark.long
def test_weights_for_what_a_disturbed_sampler_draws_bring_it_back(commands, folder, begun):
    """With the divergence in the loss: where it is in the reward, at the end nothing is better than another answer,
    whoever draws.
    """
    np.save(folder / 'table.npy', -1.5 * known(begun[0])[1].astype(np.float32))
    disturbed = DISTURBED.replace('TABLE', str(folder / 'table.npy'))
    weighed, *_ = ends(commands, folder, begun, 'k2', '_weighed', constants='importance=10', before=disturbed)
    as_drawn, *_ = ends(commands, folder, begun, 'k2', '_as_drawn', before=disturbed)
    assert weighed < 0.05 < as_drawn
