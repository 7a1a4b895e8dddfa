"""What `evaluate --tasks=preference:FILE` finds, through the functions that it calls."""

import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.run import preference_files
from experiments.run.trained_format import chat_format_of
from llama_jax import pretrained
from llama_jax.errors import InputError
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.tokenizer.chat_format import FORMATS, Message, chat_format_for
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests import toy
from tests.data.preferences_test import random_pairs

PAIRS = random_pairs(9, seed=11)
FILE = preference_files.PairFile(PAIRS, 40)


def padded(tokens) -> jax.Array:
    return jnp.asarray(np.pad(tokens, (0, 24 - len(tokens)))[None])


@pytest.mark.parametrize('num_devices', [1, 8])
def test_log_probabilities_of_a_policy_are_those_of_each_answer_alone(num_devices):
    partitioner = Partitioner(make_mesh({'fsdp': num_devices}, jax.devices()[:num_devices]))
    model = toy.make_model()
    params = toy.make_params(model)
    placed = model.clone(partitioner=partitioner)
    found = preference_files.figures_of(placed, params, partitioner, FILE, batch_tokens=160)
    apply = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({'params': params}, tokens)[0][0]))

    def log_p(prompt, answer):
        by_id = np.asarray(apply(padded(np.concatenate([prompt, answer.tokens]))), np.float64)
        slots = len(prompt) - 1 + np.flatnonzero(answer.counts)
        return by_id[slots, answer.tokens[answer.counts]].sum()

    for number, pair in enumerate(PAIRS):
        for side, answer in enumerate(pair.answers):
            assert answer is not None
            summed = log_p(pair.prompt, answer)
            wanted = {
                'summed': summed,
                'mean': summed / max(1, answer.counts.sum()),
                'relative': summed - log_p(pair.prompt[:1], answer),
            }
            for name, value in wanted.items():  # sums of some nats in float32
                assert found[name][number, side] == pytest.approx(value, abs=2e-5 * max(1, abs(summed)))


def test_a_reward_model_gives_scores_and_all_is_written(tmp_path):
    """Of each answer behind its prompt, where no row holds a pair; what has no room is left out."""
    partitioner = Partitioner(make_mesh({}, jax.devices()[:1]))
    judge = LlamaForRewardModel(dataclasses.replace(toy.CONFIG, scalar_head=True), dtype=jnp.float32)
    params = toy.make_params(judge)
    longest = [
        max(len(pair.prompt) + len(answer.tokens) for answer in pair.answers if answer) for pair in PAIRS
    ]
    file = preference_files.PairFile(PAIRS, sorted(set(longest))[-2])
    figures = preference_files.figures_of(judge, params, partitioner, file, batch_tokens=80)
    assert list(figures) == ['score'] and 0 < len(file.left_out) < 5
    together = 0
    apply = jax.jit(functools.partial(judge.apply, {'params': params}))
    for number, pair in enumerate(PAIRS):
        for side, answer in enumerate(pair.answers):
            assert answer is not None
            whole = np.concatenate([pair.prompt, answer.tokens])
            together += len(whole) if number not in file.left_out else 0
            score = float(np.asarray(apply(padded(whole)))[0, len(whole) - 1])
            wanted = score if len(whole) <= file.seq_len else np.nan
            assert figures['score'][number, side] == pytest.approx(wanted, abs=2e-5, nan_ok=True)
    assert together > file.seq_len * (
        len(PAIRS) - len(file.left_out)
    )  # a pair is longer than a row, in the mean

    report = preference_files.report(file, figures)
    kept = np.isfinite(figures['score']).all(axis=1)
    right = np.mean(0.5 * (1 + np.sign(figures['score'][kept, 0] - figures['score'][kept, 1])))
    assert report['n'] == 9 - len(file.left_out) == kept.sum() and report['left_out'] == len(file.left_out)
    assert report['accuracy_score'] == report['score']['accuracy'] == right
    assert 0 <= report['score']['bag_of_words'] <= 1
    output, header = epath.Path(tmp_path), {'model': 'f00', 'chat_format': ''}
    preference_files.check_samples(output, 'a/b.jsonl', header)
    preference_files.write(output, 'a/b.jsonl', header, file, figures)
    preference_files.check_samples(output, 'a/b.jsonl', header)
    with pytest.raises(InputError, match="is of another run: model was 'f00' and is 'f01'; write to another"):
        preference_files.check_samples(output, 'a/b.jsonl', header | {'model': 'f01'})
    assert (tmp_path / 'preference_a_b.jsonl_score.png').read_bytes().startswith(b'\x89PNG')
    _, *lines = (tmp_path / 'samples' / 'preference_a_b.jsonl.jsonl').read_text().splitlines()
    assert [json.loads(line)['index'] for line in lines] == list(range(9))
    first = int(np.flatnonzero(kept)[0])
    assert json.loads(lines[first])['score'] == figures['score'][first].tolist()
    shown = preference_files.describe({'preference:a/b.jsonl': report})
    assert 'the longer is better' in shown and f'{len(file.left_out)} more pairs are too long' in shown


def test_pairs_that_are_too_long_are_counted(shared_data, tmp_path, caplog):
    tokenizer = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    lines = [{'prompt': 'ba ' * n, 'chosen': 'dio', 'rejected': 'fa'} for n in (1, 2, 40)]
    (file := tmp_path / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    read = functools.partial(
        preference_files.read_pairs,
        [str(file)],
        tokenizer,
        chat_format_for(tokenizer, 'plain'),
        'stop',
        limit=0,
    )
    assert read(32)[str(file)].left_out == [2] and 'left out 1 of 3 pairs' in caplog.text
    with pytest.raises(
        InputError, match='of 3 pairs there is none of which both answers.* at most 2 tokens: the'
    ):
        read(2)


def test_a_checkpoint_is_asked_as_it_was_trained(shared_data, tmp_path, caplog):
    """As its run's record says; without a run as its template says; else, or where told, otherwise."""
    caplog.set_level(logging.INFO)
    tokenizer = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')

    def tags(kind, given=''):
        opened = pretrained.Checkpoint(epath.Path(tmp_path), kind, epath.Path(tmp_path))
        ids = chat_format_of(opened, tokenizer, given).encode_prompt([Message('user', 'ba')])
        named = {name: chat_format_for(tokenizer, name).encode_prompt([Message('user', 'ba')]) for name in FORMATS
                 if name != 'llama3'}  # fmt: skip
        return next(name for name, wanted in named.items() if wanted == ids)

    assert tags('orbax') == tags('meta') == 'llama2'
    (tmp_path / 'chat_template.jinja').write_text(chat_format_for(tokenizer, 'tulu').template)
    assert tags('orbax') == tags('huggingface') == 'tulu' and tags('huggingface', 'vicuna') == 'vicuna'
    for name in ('hh', ''):
        record = {'config': {'data': {'format': name}}, 'base_checkpoint': '', 'data_fingerprint': ''}
        (tmp_path / 'config.json').write_text(json.dumps(record))
        assert tags('orbax') == (name or 'llama2') and tags('orbax', 'alpaca') == 'alpaca'
    assert 'prompts are spelled as in its training: hh' in caplog.text
    # Each checkpoint has a copy of a record that is lost.
    (copy := tmp_path / 'checkpoints/7/metadata').mkdir(parents=True)
    (copy / 'metadata').write_text(json.dumps(record | {'config': {'data': {'format': 'hh'}}}))
    (tmp_path / 'config.json').unlink()
    assert tags('orbax') == 'hh'


def test_files_of_pairs_are_told_from_other_tasks():
    names = ['piqa', 'preference:a.jsonl', 'perplexity:b.txt', 'preference:a.jsonl']
    assert preference_files.split_tasks(names) == (['a.jsonl'], ['piqa', 'perplexity:b.txt'])
