"""That a policy learns what is preferred: stories in which a word comes up."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.inference.scoring import score
from llama_jax.models.llama import LlamaForCausalLM
from tests.learning_runs import OPTIMISED, read_lines, train, write_lines

PROMPT, WORD = 'Once upon a time', re.compile(r'\bdogs?\b')


def samples(commands, folder, checkpoint, tokenizer, number, seed):
    """Beginnings of stories, drawn as likely as they are to a model."""
    output = folder / f'{number}.jsonl'
    prompts = write_lines(folder / f'prompts{number}.jsonl', number * [{'prompt': PROMPT}])
    commands.run(
        'generate', f'--checkpoint={checkpoint}', f'--tokenizer={tokenizer}', f'--prompts={prompts}',
        f'--output={output}', '--max_new_tokens=64', '--temperature=1', f'--seed={seed}', '--batch_size=100',
        '--dtype=float32', before=OPTIMISED,
    ).succeeded()  # fmt: skip
    return [line['completion'] for line in read_lines(output)]


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
    config = {
        'data.train': write_lines(tmp_path / 'pairs.jsonl', pairs), 'data.seq_len': 512,
        'data.validation_fraction': 0.0, 'data.tokenizer': tokenizer_file, 'train.batch_size': 4,
        'train.loss_chunks': 1, 'train.num_epochs': 2.0, 'optimizer.learning_rate': 3e-4,
        'optimizer.warmup_steps': 5, 'loss.nll': 0.0, 'log.every': 1, 'seed': seed,
    }  # fmt: skip
    workdir = train(commands, 'dpo', 'dpo.py:checkpoint', tmp_path / 'run', origin, config)
    steps = read_lines(workdir / 'metrics.jsonl')
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
