"""What `evaluate --tasks=preference:FILE` finds, through the functions that it calls."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.run import preference_files
from llama_jax.data.preferences import PreferenceRows
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.partitioning import Partitioner, make_mesh
from tests import toy
from tests.data.preferences_test import random_pairs

PAIRS = random_pairs(9, seed=11)
ROWS = PreferenceRows(PAIRS, 40)


def padded(tokens) -> jax.Array:
    return jnp.asarray(np.pad(tokens, (0, 24 - len(tokens)))[None])


@pytest.mark.parametrize('num_devices', [1, 8])
def test_log_probabilities_of_a_policy_are_those_of_each_answer_alone(num_devices):
    partitioner = Partitioner(make_mesh({'fsdp': num_devices}, jax.devices()[:num_devices]))
    model = toy.make_model()
    params = toy.make_params(model)
    placed = model.clone(partitioner=partitioner)
    found = preference_files.figures_of(placed, params, partitioner, ROWS, batch_tokens=160)
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
    partitioner = Partitioner(make_mesh({}, jax.devices()[:1]))
    judge = LlamaForRewardModel(dataclasses.replace(toy.CONFIG, scalar_head=True), dtype=jnp.float32)
    params = toy.make_params(judge)
    figures = preference_files.figures_of(judge, params, partitioner, ROWS, batch_tokens=80)
    assert list(figures) == ['score']
    answer = PAIRS[3].answers[1]
    assert answer is not None
    whole = np.concatenate([PAIRS[3].prompt, answer.tokens])
    alone = judge.apply({'params': params}, padded(whole))
    assert figures['score'][3, 1] == pytest.approx(float(np.asarray(alone)[0, len(whole) - 1]), abs=1e-5)

    report = preference_files.report(ROWS, figures)
    right = np.mean(0.5 * (1 + np.sign(figures['score'][:, 0] - figures['score'][:, 1])))
    assert report['n'] == 9 and report['accuracy_score'] == report['score']['accuracy'] == right
    assert 0 <= report['score']['bag_of_words'] <= 1
    preference_files.write(epath.Path(tmp_path), 'a/b.jsonl', ROWS, figures)
    assert (tmp_path / 'preference_a_b.jsonl_score.png').read_bytes().startswith(b'\x89PNG')
    lines = (tmp_path / 'samples' / 'preference_a_b.jsonl.jsonl').read_text().splitlines()
    assert [json.loads(line)['index'] for line in lines] == list(range(9))
    assert json.loads(lines[3])['score'] == figures['score'][3].tolist()
    assert 'the longer is better' in preference_files.describe({'preference:a/b.jsonl': report})


def test_files_of_pairs_are_told_from_other_tasks():
    names = ['piqa', 'preference:a.jsonl', 'perplexity:b.txt', 'preference:a.jsonl']
    assert preference_files.split_tasks(names) == (['a.jsonl'], ['piqa', 'perplexity:b.txt'])
