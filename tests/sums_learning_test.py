"""Verifiable rewards: stories260K, taught sums of two digits by a careless teacher, goes on by what a task grades."""

import numpy as np
import pytest

from tests.frontier_plot import plot_ways
from tests.learning_runs import draw, train, write_lines
from tests.policy_runs import logged

NUM_HELD_OUT, NUM_TOKENS = 256, 28
TASK = 'task:gsm8k:exact_match_flexible'  # the last number is the answer
SAMPLES = 4  # answers to each held-out sum
SLIPS = 0.18


def asked(a, b):
    """A sum as its benchmark has it."""
    return {'prompt': f'{a}+{b}:', 'question': f'{a}+{b}:', 'answer': f'#### {a + b}'}


def worked_out(a, b, rng):
    """The same with what a teacher says, digit by digit, who is wrong by one or two at each in so many sums."""

    def slip(digit):
        return digit if rng.random() >= SLIPS else max(0, digit + int(rng.choice([-2, -1, 1, 2])))

    units = slip(a % 10 + b % 10)
    tens = slip(a // 10 + b // 10 + units // 10)
    added = f'{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{"+1" if units > 9 else ""}={tens}'
    return asked(a, b) | {'completion': f' {added}, {10 * tens + units % 10}'}


class Sums:
    """Sums in a folder, some of them held out, and the commands on them."""

    def __init__(self, commands, folder, weights, seed):
        self.commands, self.folder, self.weights, self.seed = commands, folder, weights, seed
        rng = np.random.default_rng(seed)
        pairs = rng.permutation([(a, b) for a in range(10, 100) for b in range(10, 100)]).tolist()
        held_out, others = pairs[:NUM_HELD_OUT], pairs[NUM_HELD_OUT:]
        self.taught = write_lines(folder / 'taught.jsonl', (worked_out(*pair, rng) for pair in others))
        self.prompts = write_lines(folder / 'prompts.jsonl', (asked(*pair) for pair in others))
        self.held_out = write_lines(folder / 'held_out.jsonl', (asked(*pair) for pair in held_out))

    def train(self, command, recipe, name, checkpoint, config):
        config = {
            'data.seq_len': 128, 'data.validation_fraction': 0.0, 'train.loss_chunks': 1,
            'optimizer.weight_decay': 0.0, 'seed': self.seed,
        } | config  # fmt: skip
        return train(self.commands, command, recipe, self.folder / name, checkpoint, config)

    def base(self):
        return self.train(
            'sft', 'sft.py:checkpoint', 'base', self.weights / 'stories260K.pt',
            {
                'data.train': self.taught, 'data.tokenizer': self.weights / 'tok512.model', 'train.batch_size': 16,
                'train.num_epochs': 0.0, 'train.num_steps': 480, 'optimizer.learning_rate': 3e-3,
                'optimizer.warmup_steps': 10, 'eval.sample_tokens': 0,
            },
        )  # fmt: skip

    def learn(self, algorithm, base):
        """By what the task grades; what an iteration drew is one update. Divergence is measured, and costs nothing."""
        return self.train(
            'ppo', f'grpo.py:checkpoint,{algorithm}', algorithm, base,
            {
                'data.train': self.prompts, 'rollout.batch_size': 512, 'rollout.samples': 8, 'rollout.slots': 512,
                'rollout.max_new_tokens': NUM_TOKENS, 'train.batch_size': 512, 'train.num_steps': 24,
                'optimizer.learning_rate': 1.5e-4, 'optimizer.warmup_steps': 2, 'optimizer.final_fraction': 0.1,
                'algorithm.beta': 0.0, 'algorithm.constants': 'divergence=k3', 'algorithm.rewards': TASK,
                'checkpoint.every': 24, 'eval.every': 0, 'log.every': 1,
            },
        )  # fmt: skip

    def judged(self, checkpoint):
        """(share of right answers to held-out sums, tokens of each wrong one)."""
        lines = draw(
            self.commands, checkpoint, self.held_out, TASK, self.folder / f'{checkpoint.name}.jsonl',
            f'--samples={SAMPLES}', f'--max_new_tokens={NUM_TOKENS}', f'--seed={self.seed}',
        )  # fmt: skip
        answers = [one for line in lines for one in line['candidates']]
        wrong = np.array([one['num_tokens'] for one in answers if not one['score']])
        return 1 - len(wrong) / len(answers), wrong


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_sums_of_a_careless_teacher_come_right_by_what_a_task_grades(commands, shared_data, tmp_path, seed):
    """Held out. Where a token counts alike whatever its answer's length, wrong answers are no longer: to 2 errors."""
    sums = Sums(commands, tmp_path, shared_data / 'weights/stories260K', seed)
    base = sums.base()
    first, _ = sums.judged(base)
    print(f'seed {seed}: {first:.1%} of answers to held-out sums are right')
    assert 0.4 <= first <= 0.6
    shares, lengths, plotted = {}, {}, {}
    for algorithm in ('grpo', 'dr_grpo'):
        run = sums.learn(algorithm, base)
        shares[algorithm], wrong = sums.judged(run)
        lengths[algorithm] = np.mean(wrong), np.std(wrong) / len(wrong) ** 0.5
        plotted[algorithm] = [(line['kl'], line['reward']) for line in logged(run)]
        print(
            f'seed {seed}, {algorithm}: then {shares[algorithm]:.1%} at {plotted[algorithm][-1][0]:.2f} nats; '
            f'{len(wrong)} wrong answers of {lengths[algorithm][0]:.2f} tokens, standard error '
            f'{lengths[algorithm][1]:.2f}'
        )
    plot_ways(tmp_path / 'sums.png', plotted, 'share of right sums', first)
    print(f'share over nats, seed {seed}: {tmp_path / "sums.png"}')
    assert shares['grpo'] - first >= 0.15
    (of_grpo, error), (of_dr_grpo, other) = lengths.values()
    assert of_dr_grpo <= of_grpo + 2 * np.hypot(error, other)
