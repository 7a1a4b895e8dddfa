"""PPO against a learnt judge: answers list three things, of which some are liked more than others."""

import numpy as np
import pytest

from tests.frontier_plot import plot_ways
from tests.learning_runs import draw, once_a_seed, train, write_lines
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

    def judge(self, policy, name='judge', num_pairs=1700, warmup_steps=10):
        """A reward model of so many pairs."""
        file = self.folder / f'{name}.jsonl'
        file.write_text(
            ''.join((self.folder / 'pairs.jsonl').read_text().splitlines(keepends=True)[:num_pairs])
        )
        return self.train(
            'reward_model', name, policy, data__train=file, data__weights='',
            data__validation=self.folder / 'held_out.jsonl', train__batch_size=8, train__num_epochs=2.0,
            optimizer__learning_rate=1e-3, optimizer__warmup_steps=warmup_steps, reward__margin='none',
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

    def learn(self, name, policy, judge, *, num_iterations, beta, values_from, **overrides):
        run = self.train(
            'ppo', name, policy, **{
                'data__train': self.folder / 'prompts.jsonl', 'data__validation_fraction': 0.0,
                'rollout__batch_size': 64, 'rollout__samples': 8, 'rollout__slots': 64, 'rollout__max_new_tokens': 24,
                'train__batch_size': 16, 'train__num_steps': 4 * num_iterations, 'optimizer__learning_rate': 3e-4,
                'algorithm__beta': beta, 'algorithm__values_from': values_from,
                'algorithm__rewards': f'{judge},{self.gold}=0', 'checkpoint__every': 4 * num_iterations,
                'eval__every': 0, 'log__every': 1,
            } | overrides
        )  # fmt: skip
        return [line for line in logged(run) if 'reward' in line]


@pytest.fixture(scope='module')
def worlds(commands, shared_data, tmp_path_factory):
    """By seed: who lists what, the policy, how far what its answers are worth is spread, a judge of them."""

    def make(folder, seed):
        lists = Lists(commands, folder, shared_data / 'weights/stories260K', seed)
        policy = lists.policy()
        return lists, policy, lists.compare(policy), lists.judge(policy)

    return once_a_seed(tmp_path_factory, 'lists', make)


def described(lists, lines):
    """(gold by iteration, explained variance), printed."""
    gold = np.array([line[f'reward/{lists.gold}'] for line in lines])
    expected = np.array([line['explained_variance'] for line in lines])
    print(
        f'seed {lists.seed}: gold {gold[0]:.2f} to {gold[-3:].mean():.2f}, {gold.max():.2f} at most; '
        f'judge {lines[0]["reward"]:.2f} to {lines[-1]["reward"]:.2f} at {lines[-1]["kl"]:.2f} nats; '
        f'explained variance {", ".join(f"{one:.2f}" for one in expected[[0, 2, 4, 9, -1]])}'
    )
    return gold, expected


@pytest.mark.long
@pytest.mark.parametrize('seed', [0])
def test_gold_rises_by_what_a_judge_has_learnt_of_it(worlds, tmp_path, seed):
    """By a standard deviation of the policy's own answers. Values that begin as the judge come to know what is worth.

    They explain more of it at first than nothing does, as values from zero begin.
    """
    lists, policy, spread, judge = worlds(seed)
    plotted = {}
    for beta, num_iterations in ((0.3, ITERATIONS), (0.0, 2 * ITERATIONS)):
        lines = lists.learn(
            f'from_judge_{beta}', policy, judge, num_iterations=num_iterations, beta=beta, values_from=judge
        )
        gold, expected = described(lists, lines)
        for what, values in (('gold', gold), ('judge', [line['reward'] for line in lines])):
            pairs = zip(lines, values, strict=True)
            plotted[f'{what}, beta {beta}'] = [(line['kl'], value) for line, value in pairs]
        if beta:
            assert gold[-3:].mean() - gold[0] >= spread and expected[-3:].mean() >= 0.3
            assert expected[0] > 0
    plot_ways(tmp_path / 'gold.png', plotted, 'mean score')


@pytest.mark.long
@pytest.mark.parametrize('begun_as', ['judge', 'zero'])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_gold_rises_by_three_seeds_as_values_come_to_expect_what_is_worth(worlds, seed, begun_as):
    """Where a nat costs a sixth, and values have ten times the policy's rate, in 128 updates.

    A score of 0, or a small one, has a long way to go in so few. As a judge they expect some of it from the first.
    """
    lists, policy, spread, judge = worlds(seed)
    lines = lists.learn(
        f'as_{begun_as}', policy, judge, num_iterations=32, beta=0.05,
        values_from=judge if begun_as == 'judge' else 'zero', algorithm__constants='value_rate=10',
    )  # fmt: skip
    print(f'values from {begun_as}; what answers are worth is spread by {spread:.2f}')
    gold, expected = described(lists, lines)
    print(f'over the last three iterations they explain {expected[-3:].mean():.2f}')
    assert gold[-3:].mean() - gold[0] >= spread
    assert expected[0] > 0 if begun_as == 'judge' else expected[0] == 0
    assert expected[-3:].mean() >= 0.3


@pytest.mark.long
def test_without_a_divergence_gold_turns_while_the_judge_rises(worlds, tmp_path):
    """A judge that has seen 400 pairs is wrong about some of what the policy finds."""
    lists, policy, _, _ = worlds(0)
    judge = lists.judge(policy, name='judge_of_few', num_pairs=400, warmup_steps=3)
    lines = lists.learn(
        'too_far', policy, judge, num_iterations=ITERATIONS, beta=0.0, values_from='zero',
        algorithm__constants='value_rate=5', optimizer__learning_rate=1e-3,
    )  # fmt: skip
    gold, _ = described(lists, lines)
    judged = np.array([line['reward'] for line in lines])
    ways = {'gold': gold, 'judge': judged}
    points = {
        name: [(line['kl'], one) for line, one in zip(lines, values, strict=True)]
        for name, values in ways.items()
    }
    plot_ways(tmp_path / 'gold_turns.png', points, 'mean score')
    turn = gold.argmax()
    assert gold[turn] - gold[0] >= 0.5 and gold[turn] - gold[-3:].mean() >= 0.5
    assert judged[-3:].mean() > judged[turn]
