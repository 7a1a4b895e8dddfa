"""That a policy learns from its answers: stories260K, a model of simple stories, rewarded for a word that few hold."""

import json
import math

import pytest

from tests.policy_runs import logged
from tests.sft_learning_test import OPTIMISED

WORD = 'happy'
WHO = ('girl named Lily', 'boy named Tim', 'dog named Max', 'cat named Tom', 'bird', 'bear', 'girl named Mia',
       'boy named Ben')  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize('seed', [0])
def test_a_word_comes_to_most_stories_within_few_nats(commands, shared_data, tmp_path, seed):
    """Of stories of 48 tokens, drawn before each update: of few at first, of four fifths at last."""
    (tmp_path / 'reward.py').write_text(
        f'def score(prompt, answer, record):\n    return float({WORD!r} in answer)\n'
    )
    prompts = [{'prompt': f'Once upon a time, there was a little {who}.'} for who in WHO]
    (tmp_path / 'prompts.jsonl').write_text(''.join(json.dumps(one) + '\n' for one in prompts))
    weights = shared_data / 'weights/stories260K'
    config = {
        'data.tokenizer': weights / 'tok512.model', 'data.train': tmp_path / 'prompts.jsonl', 'data.format': 'plain',
        'data.seq_len': 256, 'data.validation_fraction': 0.0, 'model.dtype': 'float32', 'model.remat': 'none',
        'train.loss_chunks': 1, 'rollout.batch_size': 128, 'rollout.samples': 16, 'rollout.slots': 128,
        'rollout.max_new_tokens': 48, 'train.batch_size': 128, 'train.num_steps': 12,
        'optimizer.learning_rate': 2e-4, 'algorithm.beta': 0.1, 'optimizer.weight_decay': 0.0,
        'checkpoint.every': 12, 'eval.every': 0, 'log.every': 1,
        'log.tensorboard': False, 'algorithm.rewards': f'{tmp_path / "reward.py"}:score', 'seed': seed,
    }  # fmt: skip
    commands.run(
        'ppo', '--config=configs/grpo.py:checkpoint', f'--workdir={tmp_path / "run"}',
        f'--checkpoint={weights / "stories260K.pt"}', *(f'--config.{key}={value}' for key, value in config.items()),
        before=OPTIMISED,
    ).succeeded()  # fmt: skip
    lines = logged(tmp_path / 'run')
    first, last = (
        [sum(line[key] for line in part) / len(part) for key in ('reward', 'kl')]
        for part in (lines[:1], lines[-3:])
    )
    p, q = first[0], last[0]
    least = q * math.log(q / p) + ((1 - q) * math.log((1 - q) / (1 - p)) if q < 1 else 0.0)
    print(
        f'grpo, seed {seed}: {WORD} in {p:.0%} of stories, then in {q:.0%} at {last[1]:.2f} nats ({least:.2f} at least)'
    )
    assert p <= 0.2 and q >= 0.8 and last[1] <= 10
