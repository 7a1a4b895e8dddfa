import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.errors import InputError
from llama_jax.losses.policy import (
    PPO,
    PRESETS,
    Algorithm,
    ValueLoss,
    divergences,
    drawn_log_probabilities,
    policy_loss,
    policy_losses,
    policy_of,
    value_losses,
)
from llama_jax.models.reward import VALUE, LlamaForRewardModel
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.state import new_state
from llama_jax.train.step import train_step
from llama_jax.types import PolicyBatch
from tests import toy

RNG = np.random.default_rng()  # new numbers each time
# Rows of answers: (segment, its prompt's tokens, its answer's).
ROWS = [[(1, 3, 5), (2, 2, 1), (3, 4, 9)], [(1, 6, 11), (2, 1, 4)], [(1, 2, 20)], []]
LENGTH, PLACES = 24, 3


def ragged_batch(rows=ROWS, weights='token', length=LENGTH) -> Any:
    """Rows of answers with numbers of a policy that has moved; padding and prompts hold numbers that must not count."""
    shape = len(rows), length
    segments, mask, lengths = (
        np.zeros(shape, np.int32),
        np.zeros(shape),
        np.zeros((len(rows), PLACES), np.int32),
    )
    positions = np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        start = 0
        for segment, prompt, answer in row:
            end = start + prompt + answer
            segments[number, start:end] = segment
            positions[number, start:end] = np.arange(prompt + answer)
            # Targets of the answer begin at the last token of the prompt.
            mask[number, start + prompt - 1 : end - 1] = 1
            lengths[number, segment - 1] = answer
            start = end
    answers = (lengths > 0).sum(axis=1)
    counts = {'token': lengths.sum(axis=1), 'sequence': answers, 'constant': answers * 30.0}[weights]
    each = np.where(mask > 0, 1.0, 0.0)
    if weights == 'sequence':
        each = each / np.maximum(np.take_along_axis(np.pad(lengths, ((0, 0), (1, 0))), segments, axis=1), 1)
    numbers = {name: RNG.normal(size=shape) for name in ('advantages', 'values', 'returns')}
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if np.asarray(x).dtype.kind == 'f' else jnp.int32),
        PolicyBatch(
            tokens=RNG.integers(toy.CONFIG.vocab_size, size=shape), targets=RNG.integers(64, size=shape),
            positions=positions, segment_ids=segments, weights=each, old=-RNG.uniform(0.1, 4, size=shape),
            reference=-RNG.uniform(0.1, 4, size=shape), importance=RNG.uniform(0.5, 2, size=shape),
            lengths=lengths, counts=np.asarray(counts, float),
            reported=np.full(len(rows), counts.sum() / max(mask.sum(), 1)), beta=np.full(len(rows), 0.3), **numbers,
        ),
    )  # fmt: skip


def answers_of(batch):
    """(row, slots) of every answer's targets."""
    for row in range(batch.tokens.shape[0]):
        for segment in range(1, PLACES + 1):
            slots = np.flatnonzero((batch.segment_ids[row] == segment) & (batch.weights[row] > 0))
            if len(slots):
                yield row, slots


def expected_loss(algorithm: Algorithm, log_p, batch: PolicyBatch) -> tuple[float, np.ndarray]:
    """The papers' formulas, answer by answer in float64: the sum, and its gradient in log_p by hand."""
    total, gradient = 0.0, np.zeros(batch.tokens.shape)
    b = jax.tree.map(lambda x: np.asarray(x, np.float64), batch)
    for row, slots in answers_of(batch):
        moved = log_p[row, slots] - b.old[row, slots]
        sizes = {'sequence': 1.0, 'sequence_mean': 1 / len(slots)}
        level = sizes.get(algorithm.ratio)
        for place, slot in enumerate(slots):
            rho = np.exp(moved[place] if level is None else level * moved.sum())
            worth, often = b.advantages[row, slot], b.importance[row, slot] * b.weights[row, slot]
            held = min(max(rho, 1 - algorithm.clip_low), 1 + algorithm.clip_high)
            if algorithm.ratio == 'none':
                loss, slope, on = -worth * log_p[row, slot], -worth, [slot]
            elif algorithm.ratio == 'token_weight':
                loss, slope, on = -held * worth * log_p[row, slot], -held * worth, [slot]
            else:
                loss = -min(rho * worth, held * worth)
                slope = -rho * worth * (level or 1.0) if rho * worth <= held * worth else 0.0
                on = [slot] if level is None else slots
            gradient[row, on] += often * slope
            away = log_p[row, slot] - b.reference[row, slot]
            if algorithm.divergence == 'k2':
                loss, more = loss + b.beta[row] * away**2 / 2, b.beta[row] * away
            elif algorithm.divergence == 'k3':
                loss += b.beta[row] * (np.exp(-away) - 1 + away)
                more = b.beta[row] * (1 - np.exp(-away))
            else:
                more = 0.0
            gradient[row, slot] += often * more
            total += often * loss
    return total, gradient


def loss_of(algorithm, log_p, batch):
    """As `policy_loss` sums it, without a model."""
    losses, _ = policy_losses(algorithm, log_p, batch)
    if algorithm.divergence in ('k2', 'k3'):
        away = log_p - batch.reference
        losses = losses + batch.beta[:, None] * divergences(algorithm.divergence, away)
    return jnp.sum(jnp.where(batch.weights > 0, batch.weights * batch.importance * losses, 0.0))


@pytest.mark.parametrize('divergence', ['reward', 'k2', 'k3'])
@pytest.mark.parametrize('preset', PRESETS)
def test_each_presets_loss_and_gradient_are_its_papers_in_float64(preset, divergence):
    algorithm = dataclasses.replace(PRESETS[preset], divergence=divergence)
    batch = ragged_batch(weights=algorithm.weights)
    log_p = np.asarray(batch.old + np.float32(RNG.normal(scale=0.15, size=batch.old.shape)))
    wanted, slope = expected_loss(algorithm, log_p.astype(np.float64), batch)
    found, gradient = jax.value_and_grad(functools.partial(loss_of, algorithm))(jnp.asarray(log_p), batch)
    # Ratios of answers are exponentials of sums of 20 numbers of fp32.
    assert found == pytest.approx(wanted, rel=2e-5, abs=2e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


def test_presets_differ_from_ppo_in_their_rows_of_the_table_alone():
    inf = math.inf
    in_group = {'advantage': 'group_std', 'whiten': False, 'weights': 'sequence'}
    table = {
        'ppo': {},
        'reinforce': {
            'advantage': 'batch_mean', 'whiten': False, 'ratio': 'none', 'clip_low': inf, 'clip_high': inf
        },
        'rloo': {'advantage': 'leave_one_out', 'whiten': False, 'ratio': 'sequence', 'weights': 'sequence'},
        'grpo': in_group | {'divergence': 'k3'},
        'dr_grpo': in_group | {'advantage': 'group_mean', 'weights': 'constant', 'divergence': 'none'},
        'dapo': {
            'advantage': 'group_std', 'whiten': False, 'clip_high': 0.28, 'divergence': 'none', 'refill': True
        },
        'gspo': in_group | {
            'ratio': 'sequence_mean', 'clip_low': 3e-4, 'clip_high': 4e-4, 'divergence': 'none'
        },
        'cispo': {
            'advantage': 'group_std', 'whiten': False, 'ratio': 'token_weight', 'clip_low': inf,
            'clip_high': 0.28, 'divergence': 'none',
        },
    }  # fmt: skip
    found = {
        name: {k: v for k, v in vars(one).items() if v != getattr(PPO, k)} for name, one in PRESETS.items()
    }
    assert found == table


def test_values_are_learnt_by_the_larger_of_two_errors():
    batch = ragged_batch()
    values = np.float32(RNG.normal(size=batch.values.shape))
    found = value_losses(ValueLoss(clip=0.2), jnp.asarray(values), batch)
    old, came = np.asarray(batch.values, np.float64), np.asarray(batch.returns, np.float64)
    near = old + np.clip(values - old, -0.2, 0.2)
    np.testing.assert_allclose(
        found, 0.5 * np.maximum((values - came) ** 2, (near - came) ** 2), rtol=1e-4, atol=1e-5
    )
    free = value_losses(ValueLoss(clip=0.0), jnp.asarray(values), batch)
    np.testing.assert_allclose(free, 0.5 * (values - came) ** 2, rtol=1e-4, atol=1e-5)


# ---- where training ends, with exact gradients over 16 actions


REWARDS = np.random.default_rng(3).normal(scale=0.35, size=16)
START = np.random.default_rng(4).normal(size=16)
BETA = 0.3
BASE = np.exp(START) / np.exp(START).sum()
TILTED = BASE * np.exp(REWARDS / BETA) / (BASE * np.exp(REWARDS / BETA)).sum()


def other_optimum() -> np.ndarray:
    """beta pi0 / (lambda - r), with the lambda that makes it a distribution."""
    low, high = REWARDS.max() + 1e-12, REWARDS.max() + 100
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * BASE / (middle - REWARDS)).sum() > 1 else (low, middle)
    return BETA * BASE / (high - REWARDS)


def end_of_training(divergence: str, by_spread: bool = False) -> np.ndarray:
    """The law that exact policy gradients end at: every action stands in the batch, as often as it is drawn."""
    kinds = {'k1': 'none'}
    algorithm = Algorithm(advantage='group_mean', whiten=False, divergence=kinds.get(divergence, divergence))
    empty = ragged_batch([[]], length=16)

    def step(logits, _):
        law = jax.nn.log_softmax(logits)
        weights, away = jnp.exp(law), law - jnp.log(jnp.float32(BASE))
        worth = jnp.float32(REWARDS) - (BETA * away if divergence == 'reward' else 0.0)
        mean = jnp.sum(weights * worth)
        spread = jnp.sqrt(jnp.sum(weights * jnp.square(worth - mean))) + 1e-4 if by_spread else 1.0
        batch = empty.replace(
            weights=weights[None], advantages=((worth - mean) / spread)[None], old=law[None],
            reference=jnp.log(jnp.float32(BASE))[None], importance=jnp.ones((1, 16)),
            beta=jnp.full(1, BETA), segment_ids=jnp.ones((1, 16), jnp.int32),
        )  # fmt: skip
        batch = jax.lax.stop_gradient(batch)

        def loss(logits):
            log_p = jax.nn.log_softmax(logits)[None]
            total = loss_of(algorithm, log_p, batch)
            if divergence == 'k1':  # which no algorithm may have
                total += BETA * jnp.sum(batch.weights * divergences('k1', log_p - batch.reference))
            return total

        return logits - 0.5 * jax.grad(loss)(logits), None

    end, _ = jax.lax.scan(step, jnp.float32(START), None, 20_000)
    return np.asarray(jax.nn.softmax(end), np.float64)


def distance(one, other) -> float:
    return 0.5 * float(np.abs(one - other).sum())


def test_where_the_divergence_stands_decides_the_optimum():
    other = other_optimum()
    assert other.sum() == pytest.approx(1, abs=1e-6) and distance(TILTED, BASE) > 0.2
    assert distance(TILTED, other) > 0.1
    assert distance(end_of_training('reward'), TILTED) < 1e-3
    assert distance(end_of_training('k2'), TILTED) < 1e-3
    assert distance(end_of_training('k3'), other) < 1e-3
    # In the loss k1 holds nothing back; and divided by its spread, no reward is worth a known number of nats.
    assert end_of_training('k1').max() > 0.99
    assert distance(end_of_training('k2', by_spread=True), TILTED) > 0.2


# ---- with a model

MODEL, SCORES = (
    toy.make_model(),
    LlamaForRewardModel(dataclasses.replace(toy.CONFIG, scalar_head=True), dtype=jnp.float32),
)
BATCH = ragged_batch(ROWS * 2)


def one_step(loss_fn, params, batch, num_microbatches=1):
    step = functools.partial(
        train_step, loss_fn=loss_fn, tx=toy.KEEP_GRADIENTS, num_microbatches=num_microbatches
    )
    state, metrics = jax.jit(step)(new_state(params, toy.KEEP_GRADIENTS), {}, batch, jax.random.key(0))
    return state.opt_state, metrics


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['ppo', 'gspo'])
def test_one_batch_is_four_microbatches(preset):
    algorithm = PRESETS[preset]
    params = toy.make_params(MODEL) | {VALUE: toy.make_params(SCORES, 1)}
    loss_fn = policy_loss(MODEL, algorithm, temperature=0.7, value_model=SCORES, num_chunks=2)
    wanted, metrics = one_step(loss_fn, params, BATCH)
    found, parts = one_step(loss_fn, params, BATCH, num_microbatches=4)
    toy.assert_same_gradients(found, wanted)
    for name in metrics:
        assert float(parts[name]) == pytest.approx(float(metrics[name]), rel=2e-5, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [{'fsdp': 8}, {'fsdp': 2, 'context': 2, 'tensor': 2}])
def test_one_device_is_eight(mesh):
    partitioner = Partitioner(make_mesh(mesh))
    params = toy.make_params(MODEL) | {VALUE: toy.make_params(SCORES, 1)}
    loss_fn = policy_loss(MODEL, PPO, value_model=SCORES, num_chunks=2)
    wanted, _ = one_step(loss_fn, params, BATCH)
    split = policy_loss(
        MODEL.clone(partitioner=partitioner),
        PPO,
        value_model=SCORES.clone(partitioner=partitioner),
        num_chunks=2,
    )
    with jax.set_mesh(partitioner.mesh):
        found, _ = one_step(split, params, BATCH)
    toy.assert_same_gradients(jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize('temperature', [0.7, pytest.param(1.2, marks=pytest.mark.slow)])
def test_a_policy_that_has_not_moved_has_ratio_one(temperature):
    """And at another temperature than answers were drawn at it has not."""
    params = toy.make_params(MODEL)
    drawn = jax.jit(functools.partial(drawn_log_probabilities, MODEL, temperature=temperature))
    old = drawn(params, BATCH)
    batch = BATCH.replace(old=old, reference=old)
    _, metrics = one_step(policy_loss(MODEL, PPO, temperature=temperature), params, batch)
    assert float(metrics['ratio_gap']) < 1e-5
    assert float(metrics['clipped_low']) == float(metrics['clipped_high']) == 0.0
    assert abs(float(metrics['k1'])) < 1e-6 and abs(float(metrics['k3'])) < 1e-6
    _, wrong = one_step(policy_loss(MODEL, PPO, temperature=1.0), params, batch)
    assert float(wrong['ratio_gap']) > 0.05


def test_a_policy_that_has_moved_is_clipped():
    params, tx = toy.make_params(MODEL), optax.sgd(1.0)
    old = jax.jit(functools.partial(drawn_log_probabilities, MODEL, temperature=1.0))(params, BATCH)
    batch = BATCH.replace(old=old, reference=old)
    loss_fn = policy_loss(MODEL, PPO)
    step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=tx))
    state, first = step(new_state(params, tx), {}, batch, jax.random.key(0))
    _, second = step(state, {}, batch, jax.random.key(0))
    assert float(first['ratio_gap']) < 1e-5
    assert float(second['ratio_gap']) > 0.01
    assert float(second['clipped_low']) + float(second['clipped_high']) > 0


def test_prompts_and_padding_have_no_share():
    """Numbers there may be anything, a NaN even."""
    params = toy.make_params(MODEL)
    loss_fn = policy_loss(MODEL, PPO)
    out = BATCH.weights == 0
    names = ('advantages', 'old', 'reference', 'importance')
    wild = BATCH.replace(**{name: jnp.where(out, 1e30, getattr(BATCH, name)) for name in names})
    wanted, metrics = one_step(loss_fn, params, BATCH)
    found, same = one_step(loss_fn, params, wild)
    toy.assert_same_gradients(found, wanted)
    assert metrics.keys() == same.keys()
    for name in metrics:
        assert float(same[name]) == float(metrics[name]), name


def test_the_values_stand_apart_from_the_policy():
    params = toy.make_params(MODEL)
    assert policy_of(params | {VALUE: {'score': 0}}).keys() == params.keys()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'divergence': 'k1'}, "divergence is 'k1': in the loss the mean of its gradient is 0"),
        ({'advantage': 'gea'}, "advantage is 'gea'; did you mean gae"),
        ({'ratio': 'tokens'}, "ratio is 'tokens'; did you mean token"),
        ({'clip_high': 0.0}, 'clip_high is 0.0; it must be above 0'),
        ({'refill': True}, 'refill is True, and the advantage gae, which has no groups'),
    ],
)
def test_algorithms_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PPO, **fields)
