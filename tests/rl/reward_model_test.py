"""A reward model as a judge: each answer's score is that of prompt and answer alone, however rows are made."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.rl import reward_model
from llama_jax.rl.reward_model import ModelReward
from llama_jax.rl.rollout import Rollout
from tests import toy

CONFIG = dataclasses.replace(toy.CONFIG, scalar_head=True)


@pytest.fixture(scope='module')
def judge_model():
    return LlamaForRewardModel(CONFIG, dtype=jnp.float32)


@pytest.fixture(scope='module')
def judge_params(judge_model):
    return toy.make_params(judge_model)


@pytest.fixture(scope='module')
def answers():
    """Of three prompts, ragged; several rows for the second where a row is short."""
    rng, found = np.random.default_rng(5), []
    for record, (prompt, count) in enumerate(((7, 3), (20, 9), (1, 1))):
        ids = tuple(rng.integers(4, 64, prompt).tolist())
        for sample in range(count):
            answer = tuple(rng.integers(4, 64, rng.integers(1, 12)).tolist())
            found.append(Rollout(record, sample, ids, answer, (), True, ''))
    return found


@functools.lru_cache
def reader(model):
    return jax.jit(lambda params, row: model.apply({'params': params}, row))


def alone(model, params, one):
    """The score at the last token, of prompt and answer in a row of their own."""
    tokens = [*one.prompt, *one.answer]
    row = np.zeros((1, CONFIG.max_seq_len), np.int32)
    row[0, : len(tokens)] = tokens
    return float(reader(model)(params, row)[0, len(tokens) - 1])


@pytest.fixture(scope='module')
def wanted(judge_model, judge_params, answers):
    return [alone(judge_model, judge_params, one) for one in answers]


@pytest.mark.parametrize('usual_row', [512, 40])
def test_an_answer_is_scored_as_it_is_alone(
    judge_model, judge_params, answers, wanted, monkeypatch, usual_row
):
    monkeypatch.setattr(reward_model, '_USUAL_ROW', usual_row)
    monkeypatch.setattr(reward_model, '_LONGEST_ROW', usual_row)
    found = ModelReward(judge_model, judge_params)(answers, [{}] * len(answers))
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, atol=2e-5)  # fp32 scores of size 1, summed in another order


def test_scores_do_not_depend_on_what_else_is_judged_to_the_last_bit(judge_model, judge_params, answers):
    reward = ModelReward(judge_model, judge_params)
    together = reward(answers, [{}] * len(answers))
    for record in range(3):
        places = [i for i, one in enumerate(answers) if one.record == record]
        some = [answers[i] for i in places]
        np.testing.assert_array_equal(reward(some, [{}] * len(some)), together[places])


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'fsdp': 8}, {'data': 2, 'tensor': 4}, {'context': 4, 'data': 2}])
def test_scores_are_the_same_on_a_mesh(judge_params, answers, wanted, axes):
    model = LlamaForRewardModel(CONFIG, dtype=jnp.float32, partitioner=Partitioner(make_mesh(axes)))
    found = ModelReward(model, judge_params)(answers, [{}] * len(answers))
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_what_the_judge_cannot_read_names_the_record(judge_model, judge_params):
    reward = ModelReward(judge_model, judge_params)
    long = Rollout(4, 2, (1,) * 60, (5,) * 5, (), True, 'aa')
    with pytest.raises(
        InputError, match=r'prompt and answer of record 4, answer 2 .* are 65 tokens; .* reads 64'
    ):
        reward([long], [{}])
    with pytest.raises(
        InputError, match=r'record 4, answer 2 .* holds token 64, for which the reward model has no'
    ):
        reward([dataclasses.replace(long, prompt=(1,), answer=(64,))], [{}])
