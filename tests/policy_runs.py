"""Runs of `experiments.ppo` that take seconds: what the files that test it share."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np

import llama_jax
from tests.command_line import tiny_run

REWARD = """
def score(prompt, answer, record):
    return (sum(map(ord, answer)) % 7) / 6
"""


def worth(answer: str) -> float:
    return (sum(map(ord, answer)) % 7) / 6


def begin(commands, folder, corpus) -> tuple[pathlib.Path, pathlib.Path]:
    """(a language model of a few steps, a file of four prompts); a reward stands beside the prompts."""
    commands.run('pretrain', *tiny_run(folder / 'base', corpus, train__num_steps=12)).succeeded()
    (folder / 'reward.py').write_text(REWARD)
    file = folder / 'prompts.jsonl'
    words = ('dio', 'fa', 'ku', 'gilly')
    file.write_text(''.join(json.dumps({'prompt': f'ba {word}'}) + '\n' for word in words))
    return folder / 'base', file


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
