"""That fine-tuning teaches: stories260K, a model of simple stories, on Alpaca and on short dialogs. Minutes; by hand."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.data.examples import Encoder, ExampleRows, collate_examples, is_held_out
from llama_jax.data.records import Conversation, read_records
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.sampling import Sampler
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.tokenizer.chat_format import Message, chat_format_for

pytestmark = pytest.mark.long


def arguments(shared_data, workdir, data, seed, **overrides):
    config = {
        'data.train': data, 'data.format': 'plain', 'data.seq_len': 512, 'data.validation_fraction': 0.1,
        'train.batch_size': 8, 'train.num_epochs': 2.0, 'optimizer.learning_rate': 1e-3, 'model.dtype': 'float32',
        'model.remat': 'none', 'eval.sample_tokens': 0, 'log.tensorboard': False, 'seed': seed,
    } | overrides  # fmt: skip
    weights = shared_data / 'weights/stories260K'
    return [
        '--config=configs/sft.py:checkpoint', f'--workdir={workdir}', f'--checkpoint={weights / "stories260K.pt"}',
        f'--config.data.tokenizer={weights / "tok512.model"}', *(f'--config.{k}={v}' for k, v in config.items()),
    ]  # fmt: skip


def answer_losses(config, params, examples, seq_len):
    """Mean -log p of each example's answer."""
    model = LlamaForCausalLM(config, dtype=jnp.float32)

    @jax.jit
    def loss(batch):
        total, count, _ = language_model_loss(model)(params, {}, batch, jax.random.key(0))
        return total / count

    return np.array([float(loss(collate_examples([ExampleRows([e], seq_len)[0]]))) for e in examples])


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_answers_to_alpaca_are_learnt(commands, shared_data, tmp_path, seed):
    """Held out: their loss falls by a fifth or more, and is lower with the right instruction than with another's."""
    data = shared_data / 'finetune/alpaca_en_demo.json'
    commands.run('sft', *arguments(shared_data, tmp_path, data, seed)).succeeded()
    report = json.loads((tmp_path / 'report.json').read_text())
    fall = 1 - report['validation_loss'] / report['base_loss']
    config, params, tokenizer = llama_jax.load(tmp_path)
    encoder = Encoder(chat_format_for(tokenizer, 'plain'), 512)
    records = list(read_records([str(data)], kind=Conversation))
    held_out = [r for r in records[1:] if is_held_out(r, 0.1) and encoder.encode(r)]
    asked = [record.messages[0] for record in held_out]
    swapped = [
        Conversation((other, record.messages[1]), record.counts)
        for record, other in zip(held_out, [*asked[1:], asked[0]], strict=True)
    ]
    pairs = [(encoder.encode(a), encoder.encode(b)) for a, b in zip(held_out, swapped, strict=True)]
    pairs = [(a, b) for a, b in pairs if a and b]
    right, wrong = (answer_losses(config, params, side, 512) for side in zip(*pairs, strict=True))
    difference = wrong - right
    z = difference.mean() / (difference.std(ddof=1) / math.sqrt(len(difference)))
    print(f'seed {seed}: loss {report["base_loss"]:.3f} -> {report["validation_loss"]:.3f} ({100 * fall:.1f} %), '
          f'right against other instruction {difference.mean():.3f}, z {z:.1f} on {len(difference)}')  # fmt: skip
    assert fall >= 0.2 and z >= 3


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_answers_end_by_themselves(commands, shared_data, tmp_path, seed):
    """After short dialogs 95 of 100 greedy answers end with a stop token."""
    names, things = (
        ['Tom', 'Lily', 'Ben', 'Anna', 'Max'],
        ['dog', 'cat', 'ball', 'cake', 'hat', 'tree', 'boat'],
    )
    dialogs = [
        {'prompt': f'What does {name} see in the {place}?', 'completion': f'{name} sees a {thing} in the {place}.'}
        for name in names for thing in things for place in ('park', 'house', 'garden')
    ]  # fmt: skip
    (tmp_path / 'data.json').write_text(json.dumps(dialogs))
    workdir = tmp_path / 'run'
    short = {'data.seq_len': 128, 'train.num_epochs': 8.0}
    commands.run('sft', *arguments(shared_data, workdir, tmp_path / 'data.json', seed, **short)).succeeded()
    config, params, tokenizer = llama_jax.load(workdir)
    chat = chat_format_for(tokenizer, 'plain')
    prompts = [
        chat.encode_prompt([Message('user', f'What does {name} see in the {place}?')])
        for name in [*names, 'Sue', 'Tim', 'Mia', 'Sam', 'Joe']
        for place in ('park', 'house', 'garden', 'sky', 'box', 'car', 'water', 'room', 'shop', 'bag')
    ]
    found = generate_tokens(
        LlamaForCausalLM(config, dtype=jnp.float32), params, prompts, max_new_tokens=64, sampler=Sampler(0.0),
        stop_ids=chat.stop_ids,
    )  # fmt: skip
    ended = sum(len(ids) < 64 for ids in found) / len(found)
    print(f'seed {seed}: {100 * ended:.0f} % of {len(found)} end by themselves')
    assert ended >= 0.95
