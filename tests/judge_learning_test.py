"""PPO against a learnt judge: answers list three things, of which some are liked more than others."""

import numpy as np
import pytest
from etils import epath

from llama_jax.rl.frontier import plot_ways
from tests.learning_runs import draw, train, write_lines
from tests.policy_runs import logged
from tests.reward_learning_test import WORDS

WHO = ('Lily', 'Tom', 'Ben', 'Mia', 'Tim', 'Sue', 'Max', 'Anna')
# What an answer is worth: each thing its own number, once; a list that is none of three different things costs 2.
GOLD = """
import re
WORTH = dict(zip({words}, {worth}))
def gold(prompt, answer, record):
    found = re.findall('[a-z]+', answer)
    things = [word for word in found if word in WORTH]
    whole = len(set(things)) == len(things) == 3 and len(found) == 7
    return sum(WORTH[thing] for thing in set(things)) - 2.0 * (not whole)
"""
ITERATIONS = 20


class Lists:
    """Who lists what, as data, and the commands on them in a folder."""

    def __init__(self, commands, folder, weights, seed):
        self.commands, self.folder, self.weights, self.seed = commands, folder, weights, seed
        self.rng = np.random.default_rng(seed)
        worth = self.rng.normal(size=len(WORDS))
        said = []
        for _ in range(1600):
            one, other, third = self.rng.choice(WORDS, size=3, replace=False)
            completion = f'a {one}, a {other} and a {third}.'
            said.append({'prompt': f'{self.rng.choice(WHO)} has', 'completion': completion})
        write_lines(folder / 'said.jsonl', said)
        write_lines(folder / 'prompts.jsonl', [{'prompt': f'{who} has'} for who in WHO])
        (folder / 'gold.py').write_text(GOLD.format(words=WORDS, worth=worth.tolist()))
        self.gold = f'{folder / "gold.py"}:gold'

    def train(self, command, name, checkpoint, **overrides):
        config = {
            'data.seq_len': 128, 'train.loss_chunks': 1, 'optimizer.weight_decay': 0.0, 'seed': self.seed,
        } | {key.replace('__', '.'): value for key, value in overrides.items()}  # fmt: skip
        return train(
            self.commands, command, f'{command}.py:checkpoint', self.folder / name, checkpoint, config
        )

    def policy(self):
        return self.train(
            'sft', 'policy', self.weights / 'stories260K.pt', data__train=self.folder / 'said.jsonl',
            data__tokenizer=self.weights / 'tok512.model', data__validation_fraction=0.0, train__batch_size=8,
            train__num_epochs=2.0, optimizer__learning_rate=2e-3, optimizer__warmup_steps=5, eval__sample_tokens=0,
        )  # fmt: skip

    def judge(self, policy):
        return self.train(
            'reward_model', 'judge', policy, data__train=self.folder / 'pairs.jsonl', data__weights='',
            data__validation=self.folder / 'held_out.jsonl', train__batch_size=8, train__num_epochs=2.0,
            optimizer__learning_rate=1e-3, optimizer__warmup_steps=10, reward__margin='none',
        )  # fmt: skip

    def compare(self, policy):
        """The standard deviation of what the policy's answers are worth; writes pairs of them.

        Preferred is a with probability sigmoid(gold(a) - gold(b)).
        """
        drawn = draw(
            self.commands, policy, self.folder / 'prompts.jsonl', self.gold, self.folder / 'drawn.jsonl',
            '--samples=256', '--max_new_tokens=24', f'--seed={self.seed}',
        )  # fmt: skip
        by_prompt = {}
        for line in drawn:
            by_prompt.setdefault(line['prompt'], []).extend(line.get('candidates', ()))
        pairs = []
        while len(pairs) < 2000:
            prompt = WHO[self.rng.integers(len(WHO))] + ' has'
            a, b = self.rng.choice(len(by_prompt[prompt]), size=2, replace=False)
            one, other = (by_prompt[prompt][place] for place in (a, b))
            if one['completion'].strip() == other['completion'].strip():
                continue
            is_first = self.rng.random() < 1 / (1 + np.exp(other['score'] - one['score']))
            better, worse = (one, other) if is_first else (other, one)
            pairs.append({'prompt': prompt, 'chosen': better['completion'], 'rejected': worse['completion']})
        write_lines(self.folder / 'pairs.jsonl', pairs[:-300])
        write_lines(self.folder / 'held_out.jsonl', pairs[-300:])
        return float(np.std([one['score'] for some in by_prompt.values() for one in some]))

    def learn(self, name, policy, judge, *, num_iterations, beta, values_from):
        run = self.train(
            'ppo', name, policy, data__train=self.folder / 'prompts.jsonl', data__validation_fraction=0.0,
            rollout__batch_size=64, rollout__samples=8, rollout__slots=64, rollout__max_new_tokens=24,
            train__batch_size=16, train__num_steps=4 * num_iterations, optimizer__learning_rate=3e-4,
            algorithm__beta=beta, algorithm__values_from=values_from, algorithm__rewards=f'{judge},{self.gold}=0',
            checkpoint__every=4 * num_iterations, eval__every=0, log__every=1,
        )  # fmt: skip
        return [line for line in logged(run) if 'reward' in line]


@pytest.mark.long
@pytest.mark.parametrize('seed', [0])
def test_gold_rises_by_what_a_judge_has_learnt_of_it(commands, shared_data, tmp_path, seed):
    """By a standard deviation of the policy's own answers. Values that begin as the judge know more than those from 0.

    But for the first iteration: a judge was never asked about an answer that is not whole.
    """
    lists = Lists(commands, tmp_path, shared_data / 'weights/stories260K', seed)
    policy = lists.policy()
    spread = lists.compare(policy)
    judge = lists.judge(policy)
    expected, plotted = {}, {}
    for name, start, beta, num_iterations in (
        ('judge', judge, 0.3, ITERATIONS), ('zero', 'zero', 0.3, ITERATIONS),
        ('judge without a divergence', judge, 0.0, 2 * ITERATIONS),
    ):  # fmt: skip
        lines = lists.learn(
            f'from_{name}'.replace(' ', '_'),
            policy,
            judge,
            num_iterations=num_iterations,
            beta=beta,
            values_from=start,
        )
        gold = np.array([line[f'reward/{lists.gold}'] for line in lines])
        expected[name] = np.array([line['explained_variance'] for line in lines])
        for what, values in (('gold', gold), ('judge', [line['reward'] for line in lines])):
            label = f'{what}, beta {beta}'
            plotted.setdefault(
                label, [(line['kl'], value) for line, value in zip(lines, values, strict=True)]
            )
        print(
            f'seed {seed}, {name}: gold {gold[0]:.2f} to {gold[-3:].mean():.2f}, {gold.max():.2f} at most, spread '
            f'{spread:.2f}; judge {lines[0]["reward"]:.2f} to {lines[-1]["reward"]:.2f} at {lines[-1]["kl"]:.2f} nats; '
            f'explained variance {", ".join(f"{one:.2f}" for one in expected[name][[0, 2, 4, 9, -1]])}'
        )
        if name == 'judge':
            assert gold[-3:].mean() - gold[0] >= spread and expected[name][-3:].mean() >= 0.3
    plot_ways(epath.Path(tmp_path) / 'gold.png', plotted, 'mean score')
    assert (expected['judge'] - expected['zero'])[4:].mean() > 0.1
