"""That fine-tuning teaches: stories260K, a model of simple stories, on Alpaca and on short dialogs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import llama_jax
from llama_jax.data.examples import Encoder, ExampleRows, collate_examples, is_held_out
from llama_jax.data.record_kinds import Conversation
from llama_jax.data.records import read_records
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.sampling import Sampler
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.tokenizer.chat_format import Message, chat_format_for
from tests.learning_runs import SEEDS, read_lines, train

SEQ_LEN, HELD_OUT = 512, 0.1
ADAPTERS = {'lora.rank': 16, 'lora.alpha': 32.0, 'optimizer.learning_rate': 5e-3}
KINDS = {
    'full': {},
    'lora': ADAPTERS | {'model.weights': 'float32'},
    'nf4': ADAPTERS | {'model.weights': 'nf4'},
}


def tuned(commands, shared_data, workdir, data, seed, overrides):
    """The workdir of a run of two passes."""
    weights = shared_data / 'weights/stories260K'
    config = {
        'data.train': data, 'data.tokenizer': weights / 'tok512.model', 'data.seq_len': SEQ_LEN,
        'data.validation_fraction': HELD_OUT, 'train.batch_size': 8, 'train.num_epochs': 2.0,
        'optimizer.learning_rate': 1e-3, 'eval.sample_tokens': 0, 'eval.every': 14, 'seed': seed,
    } | overrides  # fmt: skip
    return train(commands, 'sft', 'sft.py:checkpoint', workdir, weights / 'stories260K.pt', config)


@pytest.fixture(scope='module')
def on_alpaca(commands, shared_data, tmp_path_factory):
    """(kind, seed) -> (workdir, report) of a run of two passes."""

    @functools.cache
    def run(kind, seed):
        workdir = tmp_path_factory.mktemp(f'{kind}{seed}') / 'run'
        data = shared_data / 'finetune/alpaca_en_demo.json'
        tuned(commands, shared_data, workdir, data, seed, KINDS[kind])
        return workdir, json.loads((workdir / 'report.json').read_text())

    return run


def answer_losses(config, params, examples):
    """Mean -log p of each example's answer."""
    loss_fn = language_model_loss(LlamaForCausalLM(config, dtype=jnp.float32))
    sums = jax.jit(
        lambda params, batch: loss_fn(params, {}, batch, jax.random.key(0))[:2],
        compiler_options={'xla_backend_optimization_level': 3},
    )
    found = [sums(params, collate_examples([ExampleRows([one], SEQ_LEN)[0]])) for one in examples]
    return np.array([float(total) / float(count) for total, count in found])


def z_of(differences):
    return differences.mean() / (differences.std(ddof=1) / len(differences) ** 0.5)


@pytest.mark.parametrize('seed', SEEDS)
def test_answers_to_alpaca_are_learnt(on_alpaca, shared_data, seed):
    """Held out, their loss falls by a fifth or more, and is lower with the right instruction than with another's."""
    workdir, report = on_alpaca('full', seed)
    fall = 1 - report['validation_loss'] / report['base_loss']
    config, params, tokenizer = llama_jax.load(workdir)
    encoder = Encoder(chat_format_for(tokenizer, 'plain'), SEQ_LEN)
    records = list(read_records([str(shared_data / 'finetune/alpaca_en_demo.json')], kind=Conversation))
    held_out = [r for r in records[1:] if is_held_out(r, HELD_OUT) and encoder.encode(r)]
    questions = [record.messages[0] for record in held_out]
    swapped = [
        Conversation((other, record.messages[1]), record.counts)
        for record, other in zip(held_out, [*questions[1:], questions[0]], strict=True)
    ]
    both = [(encoder.encode(a), encoder.encode(b)) for a, b in zip(held_out, swapped, strict=True)]
    kept = [pair for pair in both if all(pair)]
    right, wrong = (answer_losses(config, params, side) for side in zip(*kept, strict=True))
    difference, z = wrong - right, z_of(wrong - right)
    print(
        f'seed {seed}: loss {report["base_loss"]:.3f} to {report["validation_loss"]:.3f}, falls {100 * fall:.1f} %; '
        f'another instruction {difference.mean():+.3f}, z {z:.1f} on {len(kept)}'
    )
    assert fall >= 0.2 and z >= 3


def plot_held_out_loss(file, runs):
    """Of each kind's (workdir, report), from the loss that it began with."""
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for kind, (workdir, report) in runs.items():
        logged = read_lines(workdir / 'metrics.jsonl')
        found = {line['step']: line['validation_loss'] for line in logged if 'validation_loss' in line}
        axes.plot([0, *found], [report['base_loss'], *found.values()], marker='o', label=kind)
    axes.set(xlabel='updates', ylabel='held-out loss, nats a token of an answer', title='Alpaca, stories260K')
    axes.legend()
    figure.savefig(file)


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_adapters_learn_nearly_as_much(on_alpaca, tmp_path, seed):
    """Of what all weights gain; both beside the loss that the model in float32 begins with."""
    runs = {kind: on_alpaca(kind, seed) for kind in KINDS}
    plot_held_out_loss(tmp_path / 'sft_learning.png', runs)
    (_, full), (_, lora), (_, nf4) = runs.values()
    fall = full['base_loss'] - full['validation_loss']
    assert lora['base_loss'] == pytest.approx(full['base_loss'], rel=1e-5)
    shares = [(full['base_loss'] - report['validation_loss']) / fall for report in (lora, nf4)]
    print(
        f'seed {seed}: loss {full["base_loss"]:.3f}, nf4 {nf4["base_loss"]:.3f}, to {full["validation_loss"]:.3f}, '
        f'LoRA {lora["validation_loss"]:.3f} ({100 * shares[0]:.1f} % of the fall), nf4 {nf4["validation_loss"]:.3f} '
        f'({100 * shares[1]:.1f} %); {tmp_path / "sft_learning.png"}'
    )
    assert shares[0] >= 0.8 and shares[1] >= shares[0] - 0.05


@pytest.mark.parametrize('seed', SEEDS)
def test_answers_end_by_themselves(commands, shared_data, tmp_path, seed):
    """After short dialogs 95 of 100 greedy answers end with a stop token, to questions that were not seen too."""
    names, things = (
        ('Tom', 'Lily', 'Ben', 'Anna', 'Max'),
        ('dog', 'cat', 'ball', 'cake', 'hat', 'tree', 'boat'),
    )
    places = ('park', 'house', 'garden')
    dialogs = [
        {'prompt': f'What does {name} see in the {place}?', 'completion': f'{name} sees a {thing} in the {place}.'}
        for name in names for thing in things for place in places
    ]  # fmt: skip
    (tmp_path / 'data.json').write_text(json.dumps(dialogs))
    short = {'data.seq_len': 128, 'train.num_epochs': 8.0}
    workdir = tuned(commands, shared_data, tmp_path / 'run', tmp_path / 'data.json', seed, short)
    config, params, tokenizer = llama_jax.load(workdir)
    chat = chat_format_for(tokenizer, 'plain')
    prompts = [
        chat.encode_prompt([Message('user', f'What does {name} see in the {place}?')])
        for name in [*names, 'Sue', 'Tim', 'Mia', 'Sam', 'Joe']
        for place in [*places, 'sky', 'box', 'car', 'water', 'room', 'shop', 'bag']
    ]
    model, most = LlamaForCausalLM(config, dtype=jnp.float32), 64
    found = generate_tokens(
        model, params, prompts, max_new_tokens=most, sampler=Sampler(0.0), stop_ids=chat.stop_ids
    )
    before = llama_jax.load(shared_data / 'weights/stories260K/stories260K.pt')[1]
    base = generate_tokens(
        model, before, prompts, max_new_tokens=most, sampler=Sampler(0.0), stop_ids=chat.stop_ids
    )
    ended, ended_before = (np.mean([len(ids) < most for ids in answers]) for answers in (found, base))
    print(
        f'seed {seed}: {100 * ended:.0f} % of {len(found)} end by themselves, {100 * ended_before:.0f} % before'
    )
    assert ended >= 0.95 and ended_before < 0.5
