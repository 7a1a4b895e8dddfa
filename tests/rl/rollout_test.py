"""Answers drawn from a policy: whose distribution they have, and what they do not depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from llama_jax.errors import InputError
from llama_jax.lora import LoraConfig, abstract_adapters, combine, init_adapters
from llama_jax.models.llama import abstract_params_and_axes
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.rl import rollout
from llama_jax.rl.rollout import Sampling, rollouts, rollouts_by_record, sampler_weights
from tests import toy

PROMPTS = [[1, 5, 9], [1, 7, 2, 8, 30, 11, 4], [1], [1, 5, 9]]
SAMPLING = Sampling(0.9, max_new_tokens=12, samples=3, num_slots=4)
STOPS = (2, 3, 40, 41, 42)


class Letters:
    """A tokenizer of 60 ASCII characters."""

    vocab_size, bos_id, eos_id, stop_ids, path, sha256 = 64, 1, 2, (2,), '', ''

    def encode(self, text, bos=False, eos=False, special=False):
        return [1] * bos + [ord(letter) - 60 for letter in text] + [2] * eos

    def encode_batch(self, texts, num_threads=0):
        return [np.array(self.encode(text)) for text in texts]

    def decode(self, ids):
        return ''.join(chr(60 + i) for i in ids if i >= 4)


def draw(model, params, prompts=PROMPTS, sampling=SAMPLING, **given):
    given = {'seed': 3, 'stop_ids': STOPS} | given
    return rollouts(model, params, Letters(), prompts, sampling=sampling, **given)


@pytest.fixture(scope='module')
def drawn(model, params):
    return draw(model, params)


def bare(found):
    """All of some rollouts but the last bits of their log-probabilities."""
    return [dataclasses.replace(one, log_probabilities=()) for one in found]


@functools.lru_cache
def reader(model):
    return jax.jit(lambda params, row: model.apply({'params': params}, row)[0])


def distributions(model, params, tokens, temperature):
    """Log-probabilities of all tokens behind each of some, by reading these at once; float64 from the logits on."""
    row = np.zeros((1, toy.CONFIG.max_seq_len), np.int32)
    row[0, : len(tokens)] = tokens
    logits = np.asarray(reader(model)(params, row), np.float64)[0, : len(tokens)] / temperature
    return logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)


def log_probabilities(model, params, tokens, temperature):
    """Of each token but the first."""
    return distributions(model, params, tokens, temperature)[np.arange(len(tokens) - 1), tokens[1:]]


def test_answers_stand_in_their_order_and_hold_what_ended_them(drawn):
    assert [(one.record, one.sample) for one in drawn] == [(r, s) for r in range(4) for s in range(3)]
    assert {one.stopped for one in drawn} == {True, False}
    for one in drawn:
        assert list(one.prompt) == PROMPTS[one.record]
        assert len(one.answer) == len(one.log_probabilities) <= 12
        assert one.stopped == (one.answer[-1] in STOPS) and not set(one.answer[:-1]) & set(STOPS)
        assert one.stopped or len(one.answer) == 12
        assert one.text == Letters().decode(one.answer[: len(one.answer) - one.stopped])
    assert drawn[0].answer != drawn[9].answer, 'the same prompt under another number is drawn anew'
    assert len({one.answer for one in drawn}) > 9


@pytest.mark.parametrize('temperature', [0.7, 1.2])
def test_log_probabilities_are_of_the_distribution_that_was_drawn_from(model, params, temperature):
    for one in draw(model, params, sampling=dataclasses.replace(SAMPLING, temperature=temperature)):
        want = log_probabilities(model, params, [*one.prompt, *one.answer], temperature)
        # fp32 logits of size 10, with a cache and without.
        np.testing.assert_allclose(one.log_probabilities, want[len(one.prompt) - 1 :], atol=1e-4)


def test_rows_are_the_same_whatever_is_drawn_beside_them_to_the_last_bit(model, params, drawn):
    assert draw(model, params) == drawn
    last = draw(model, params, PROMPTS[2:], records=[2, 3])  # as after a restart
    assert last == drawn[6:]
    turned = list(
        rollouts_by_record(
            model,
            params,
            Letters(),
            PROMPTS[::-1],
            sampling=SAMPLING,
            seed=3,
            stop_ids=STOPS,
            records=[3, 2, 1, 0],
        )
    )
    assert sorted(group[0].record for group in turned) == [0, 1, 2, 3]
    assert {one for group in turned for one in group} == set(drawn)


def test_rows_are_the_same_in_any_batch_and_by_another_seed_others(model, params, drawn):
    for num_slots in (1, 16):
        assert bare(draw(model, params, sampling=dataclasses.replace(SAMPLING, num_slots=num_slots))) == bare(
            drawn
        )
    assert not {one.answer for one in draw(model, params, seed=4)} & {one.answer for one in drawn}


def test_a_ladder_draws_as_many_at_each_temperature(model, params, drawn):
    found = draw(model, params, sampling=dataclasses.replace(SAMPLING, ladder=(1.3,)))
    assert len(found) == 24
    assert [one for one in found if one.sample < 3] == drawn
    hot = next(one for one in found if one.sample == 4)
    want = log_probabilities(model, params, [*hot.prompt, *hot.answer], 1.3)[len(hot.prompt) - 1 :]
    np.testing.assert_allclose(hot.log_probabilities, want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('temperature', [1.0, 1.5])
def test_a_thousand_answers_have_the_samplers_distribution(model, params, temperature):
    """Of two tokens each: the first, and the second behind whatever first it was drawn."""
    prompt, sampling = [1, 5, 9], Sampling(temperature, max_new_tokens=2, samples=1000)
    pairs = np.array([one.answer for one in draw(model, params, [prompt], sampling, stop_ids=())])
    behind = {
        first: np.exp(distributions(model, params, [*prompt, first], temperature))
        for first in set(pairs[:, 0].tolist())
    }
    firsts = 1000 * next(iter(behind.values()))[2]
    seconds = np.sum([behind[first][3] for first in pairs[:, 0].tolist()], axis=0)
    for tokens, expected in ((pairs[:, 0], firsts), (pairs[:, 1], seconds)):
        likely = expected >= 5  # the rare ones are counted together
        observed = np.bincount(tokens, minlength=64)
        found, want = (np.append(x[likely], x[~likely].sum()) for x in (observed, expected))
        assert len(want) > 8
        statistic = np.sum((found - want) ** 2 / np.maximum(want, 1.0))
        assert statistic < scipy.stats.chi2.isf(1e-4, len(want) - 1)  # the draws are the same in every run


def test_the_samplers_copy_goes_and_the_policys_weights_stay(model, params):
    with sampler_weights(model, params) as weights:
        leaves = jax.tree.leaves(weights)
    assert leaves and all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    jax.block_until_ready(jax.tree.map(jnp.sum, params))
    failing = sampler_weights(model, params)
    leaves = jax.tree.leaves(failing.__enter__())
    failing.__exit__(RuntimeError, RuntimeError('on the way'), None)
    assert all(leaf.is_deleted() for leaf in leaves)
    with sampler_weights(toy.make_model(dtype=jnp.bfloat16), params) as weights:
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves(weights) if leaf.ndim > 1}
    assert kinds == {'bfloat16'}


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'tensor': 4, 'data': 2}, {'fsdp': 4, 'data': 2}, {'fsdp': 2, 'tensor': 4}])
def test_rows_are_the_same_on_a_mesh_of_the_samplers_own(model, params, drawn, axes):
    training = Partitioner(make_mesh({'fsdp': 8}))
    shapes, axes_of = abstract_params_and_axes(model)
    split = jax.device_put(params, training.tree_shardings(shapes, axes_of))
    own = toy.make_model(partitioner=Partitioner(make_mesh(axes)))
    with sampler_weights(own, split) as weights:
        found = draw(own, weights)
    assert bare(found) == bare(drawn)
    for one, want in zip(found, drawn, strict=True):
        np.testing.assert_allclose(one.log_probabilities, want.log_probabilities, atol=1e-4)


def test_adapters_stay_beside_their_base_and_do_not_move_to_another_mesh(model, params):
    lora = LoraConfig(rank=2, alpha=8.0)
    shapes, axes = abstract_params_and_axes(model)
    abstract_adapters(lora, shapes, axes)
    adapters = init_adapters(lora, params, jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.02, adapters)
    whole = combine(adapters, params, lora.scale)
    with sampler_weights(model, whole) as weights:
        found = draw(model, weights, PROMPTS[:1])
    want = log_probabilities(model, whole, [*found[0].prompt, *found[0].answer], 0.9)
    np.testing.assert_allclose(found[0].log_probabilities, want[len(found[0].prompt) - 1 :], atol=1e-4)
    own = toy.make_model(partitioner=Partitioner(make_mesh({'tensor': 4, 'data': 2})))
    with pytest.raises(InputError, match='merge them first'), sampler_weights(own, whole):
        pass


def test_prompts_without_room_are_counted(model, params):
    long = [[1] * 60, [1] * 53, [1] * 52]
    with pytest.raises(
        InputError, match=r'^2 of 3 prompts are longer than 52 tokens, .* context of 64 less .*, 12: .* 60'
    ):
        draw(model, params, long)


@pytest.mark.parametrize(
    'wrong',
    [
        {'temperature': 0.0},
        {'temperature': float('nan')},
        {'ladder': (0.5, -1.0)},
        {'samples': 0},
        {'num_slots': 0},
    ],
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=f'^{next(iter(wrong))} is '):
        Sampling(**wrong)


def test_draws_of_neighbours_tell_nothing_of_each_other():
    seeds = {
        rollout.draw_seed(seed, record, sample)
        for seed in range(5)
        for record in range(20)
        for sample in range(20)
    }
    assert len(seeds) == 2000 and max(seeds) < 2**31
