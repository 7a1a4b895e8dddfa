import base64
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.losses.policy import PRESETS, drawn_log_probabilities
from llama_jax.rl.advantages import token_rewards
from llama_jax.rl.iteration import Iteration, Shape
from llama_jax.rl.rewards import Weighted, judge, missing_stop
from llama_jax.rl.rollout import Rollout
from llama_jax.tokenizer.chat_format import Llama3ChatFormat
from llama_jax.tokenizer.tiktoken_tokenizer import TiktokenTokenizer, llama3_special_names

RNG = np.random.default_rng()  # new numbers each time
SHAPE = Shape(answers=8, seq_len=48, multiple=2, max_new_tokens=20, seed=3)


@pytest.fixture
def iteration() -> Iteration:
    prompts = [RNG.integers(64, size=n).astype(np.int32) for n in RNG.integers(1, 9, size=16)]
    answers = [RNG.integers(64, size=n).astype(np.int32) for n in (1, 20, *RNG.integers(1, 20, size=14))]
    numbers = [[RNG.normal(size=len(one)) for one in answers] for _ in range(7)]
    return Iteration(4, 2, prompts, answers, *numbers, beta=0.1, figures={'reward': 0.5})


def test_a_file_holds_all_of_it(iteration):
    again = Iteration.from_bytes(iteration.to_bytes())
    for field in dataclasses.fields(Iteration):
        one, other = (getattr(x, field.name) for x in (iteration, again))
        if isinstance(one, list):
            assert len(one) == len(other)
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))
        else:
            assert one == other
    with pytest.raises(ValueError, match='it holds no iteration'):
        Iteration.from_bytes(iteration.to_bytes()[:-40])


def test_each_epoch_has_every_answer_once_in_another_order(iteration):
    orders = [
        [n for i in (2 * epoch, 2 * epoch + 1) for n in iteration.numbers_of(SHAPE, i)] for epoch in range(2)
    ]
    assert all(sorted(order) == list(range(16)) for order in orders) and orders[0] != orders[1]
    assert iteration.num_minibatches(SHAPE, 3) == 6


@pytest.mark.parametrize('preset', ['ppo', 'grpo', 'dr_grpo'])
def test_an_answers_numbers_stand_where_its_tokens_are_predicted(iteration, preset):
    algorithm = PRESETS[preset]
    num_rows = iteration.num_rows(SHAPE, 2)
    assert num_rows % SHAPE.multiple == 0
    for index in range(4):
        batch, places = iteration.minibatch(SHAPE, index, num_rows, algorithm)
        assert sorted(number for number, *_ in places) == sorted(iteration.numbers_of(SHAPE, index))
        counted = np.zeros(batch.weights.shape, bool)
        for number, row, slots in places:
            answer, prompt = iteration.answers[number], iteration.prompts[number]
            np.testing.assert_array_equal(batch.targets[row, slots], answer)
            assert batch.tokens[row, slots.start] == prompt[-1]
            assert batch.positions[row, slots.start] == len(prompt) - 1
            for name in ('old', 'reference', 'advantages', 'returns', 'values', 'importance'):
                np.testing.assert_array_equal(
                    getattr(batch, name)[row, slots], getattr(iteration, name)[number].astype(np.float32)
                )
            assert batch.weights[row, slots].sum() == pytest.approx(1 if preset == 'grpo' else len(answer))
            counted[row, slots] = True
        assert np.all(batch.weights[~counted] == 0)
        tokens = sum(len(iteration.answers[number]) for number, *_ in places)
        assert batch.counts.sum() == {'ppo': tokens, 'grpo': 8, 'dr_grpo': 8 * 20}[preset]
        # Figures: a token that counts weighs so much that the sum over the number divided by is a mean.
        assert (batch.reported[:, None] * counted).sum() / batch.counts.sum() == pytest.approx(1, rel=1e-6)
        assert batch.lengths.sum() == tokens


@pytest.mark.parametrize('end', ['<|end_of_text|>', '<|eot_id|>', '<|eom_id|>', 'cut'])
def test_a_reward_lands_on_any_stop_token_of_llama3_and_on_the_last_of_what_was_cut(end):
    """There with the penalty for a missing stop."""
    alphabet = b''.join(b'%s %d\n' % (base64.b64encode(bytes([i])), i) for i in range(256))
    tokenizer = TiktokenTokenizer('bytes', alphabet, llama3_special_names())
    stop_ids = Llama3ChatFormat(tokenizer).stop_ids
    last = ord('!') if end == 'cut' else tokenizer.special_tokens[end]
    answers = [(*range(65, 65 + length), last) for length in (0, 1, 5, 19)]
    drawn = [
        Rollout(0, place, (1, 2), answer, (-1.0,) * len(answer), answer[-1] in stop_ids, '')
        for place, answer in enumerate(answers)
    ]
    assert {one.stopped for one in drawn} == {end != 'cut'}
    mine = Weighted('mine', lambda rollouts, records: np.array([0.7, 0.1, -0.2, 0.4]), 1.0)
    worth = judge([mine, Weighted('missing_stop', missing_stop, 0.5)], drawn, [{}] * 4).total
    empty = [np.zeros(len(one)) for one in answers]
    rewards = token_rewards(worth, empty, 0.1)
    found = Iteration(
        0, 0, [np.array(one.prompt) for one in drawn], [np.array(one) for one in answers], empty, empty, empty, empty,
        rewards, rewards, empty, 0.1, {},
    )  # fmt: skip
    shape = dataclasses.replace(SHAPE, answers=4)
    batch, places = found.minibatch(shape, 0, found.num_rows(shape, 1), PRESETS['ppo'])
    assert np.count_nonzero(batch.advantages) == 4
    for number, row, slots in places:
        assert batch.targets[row, slots.stop - 1] == last
        wanted = (0.7, 0.1, -0.2, 0.4)[number] - 0.5 * (end == 'cut')
        assert batch.advantages[row, slots.stop - 1] == pytest.approx(wanted, rel=1e-6)


def test_packed_answers_have_the_log_probabilities_of_each_alone(iteration, model, params):
    batch, places = iteration.minibatch(SHAPE, 0, iteration.num_rows(SHAPE, 1), PRESETS['ppo'])
    batch = jax.tree.map(jnp.asarray, batch)
    found = jax.jit(functools.partial(drawn_log_probabilities, model, temperature=0.7))(params, batch)
    logits_of = jax.jit(lambda tokens: model.apply({'params': params}, tokens)[0])
    found = np.asarray(found)
    for number, row, slots in places[:3]:
        tokens = np.concatenate([iteration.prompts[number], iteration.answers[number]])
        padded = np.zeros((1, SHAPE.seq_len), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(logits_of(padded)[0], np.float64) / 0.7
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        first = len(iteration.prompts[number]) - 1
        wanted = [log_p[first + place, token] for place, token in enumerate(iteration.answers[number])]
        np.testing.assert_allclose(found[row, slots], wanted, atol=2e-5)  # sums of fp32


def test_few_numbers_of_rows_are_compiled():
    assert dataclasses.replace(SHAPE, answers=512, multiple=8).step == 64
    assert dataclasses.replace(SHAPE, answers=8, multiple=8).step == 8
