"""That a policy learns what is preferred: stories in which a word comes up."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.inference.scoring import score
from llama_jax.models.llama import LlamaForCausalLM
from tests.sft_learning_test import OPTIMISED

PROMPT, WORD = 'Once upon a time', re.compile(r'\bdogs?\b')


def samples(commands, folder, checkpoint, tokenizer, number, seed):
    """Beginnings of stories, drawn as likely as they are to a model."""
    prompts, output = folder / f'prompts{number}.jsonl', folder / f'{number}.jsonl'
    prompts.write_text(number * (json.dumps({'prompt': PROMPT}) + '\n'))
    commands.run(
        'generate', f'--checkpoint={checkpoint}', f'--tokenizer={tokenizer}', f'--prompts={prompts}',
        f'--output={output}', '--max_new_tokens=64', '--temperature=1', f'--seed={seed}', '--batch_size=100',
        '--dtype=float32', before=OPTIMISED,
    ).succeeded()  # fmt: skip
    return [json.loads(line)['completion'] for line in output.read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_what_is_preferred_becomes_frequent(commands, shared_data, tmp_path, seed):
    """Of the base's own samples those with a dog are preferred; then dogs are three times as frequent or more."""
    weights = shared_data / 'weights/stories260K'
    origin, tokenizer_file = weights / 'stories260K.pt', weights / 'tok512.model'
    drawn = samples(commands, tmp_path, origin, tokenizer_file, 600, seed)
    liked = [text for text in drawn if WORD.search(text)]
    others = [text for text in drawn if not WORD.search(text) and text.strip()]
    rng = np.random.default_rng(seed)
    pairs = [
        {'prompt': PROMPT, 'chosen': better, 'rejected': others[other]}
        for better in liked for other in rng.choice(len(others), size=6, replace=False)
    ]  # fmt: skip
    file, workdir = tmp_path / 'pairs.jsonl', tmp_path / 'run'
    file.write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
    config = {
        'data.train': file, 'data.format': 'plain', 'data.seq_len': 512, 'data.validation_fraction': 0.0,
        'train.batch_size': 4, 'train.loss_chunks': 1, 'train.num_epochs': 2.0, 'model.dtype': 'float32',
        'model.remat': 'none', 'optimizer.learning_rate': 3e-4, 'optimizer.warmup_steps': 5, 'loss.nll': 0.0,
        'log.every': 1, 'log.tensorboard': False, 'seed': seed,
    }  # fmt: skip
    commands.run(
        'dpo', '--config=configs/dpo.py:checkpoint', f'--workdir={workdir}', f'--checkpoint={origin}',
        f'--config.data.tokenizer={tokenizer_file}', *(f'--config.{key}={value}' for key, value in config.items()),
        before=OPTIMISED,
    ).succeeded()  # fmt: skip
    steps = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    after = samples(commands, tmp_path, workdir, tokenizer_file, 200, seed + 100)
    shares = [np.mean([bool(WORD.search(text)) for text in texts]) for texts in (drawn, after)]
    print(
        f'seed {seed}: of {len(pairs)} pairs, in {100 * shares[0]:.1f} % of samples before, {100 * shares[1]:.1f} % '
        f'after; accuracy {steps[-1]["accuracy"]:.2f}, k1 {steps[-1]["k1"]:.3f} a token of the pairs, '
        f'{divergence(workdir, origin, tokenizer_file, after):.3f} of its own samples'
    )
    assert steps[0]['loss'] == pytest.approx(np.log(2), abs=1e-6)
    assert len(after) == 200 and shares[1] >= 3 * shares[0]


def divergence(workdir, origin, tokenizer_file, texts):
    """Mean over a policy's samples of its log-probability less the base's, in nats a token."""
    tokenizer = llama_jax.load_tokenizer(str(tokenizer_file))
    prompt = tuple(tokenizer.encode(PROMPT, bos=True))
    pairs = [(prompt, tuple(tokenizer.encode(text))) for text in texts if text]
    totals = []
    for checkpoint in (workdir, origin):
        config, params, _ = llama_jax.load(checkpoint, tokenizer=str(tokenizer_file))
        found = sorted(score(LlamaForCausalLM(config, dtype=jnp.float32), params, pairs))
        totals.append(sum(one.log_probability for _, one in found))
    return (totals[0] - totals[1]) / sum(len(answer) for _, answer in pairs)
