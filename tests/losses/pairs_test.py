"""The losses of pairs through a model and a train step: what a batch gives, whatever it is cut into."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.loader import PaddedRows
from llama_jax.data.preferences import Answer, EncodedPair, PreferenceRows, collate_preferences, mismatched
from llama_jax.lora import LoraConfig, init_adapters, with_base
from llama_jax.losses.dpo import (
    LOSSES,
    PreferenceLoss,
    answer_log_probabilities,
    pair_losses,
    preference_loss,
    ratio_sums,
)
from llama_jax.losses.language_model import language_model_loss
from llama_jax.losses.reward import reward_loss
from llama_jax.models.llama import LlamaForCausalLM, param_axes
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.state import new_state
from llama_jax.train.step import train_step
from llama_jax.types import LMBatch
from tests import toy
from tests.data.preferences_test import random_pairs

FORM = (7,)  # a token that is form
REWARD = LlamaForRewardModel(dataclasses.replace(toy.CONFIG, scalar_head=True), dtype=jnp.float32)


@pytest.fixture(scope='module')
def policy():
    return toy.make_model()


@pytest.fixture(scope='module')
def params(policy):
    return toy.make_params(policy)


@pytest.fixture(scope='module')
def batch():
    """Eight rows, of one to three pairs; answers of 1 to 8 tokens that count."""
    rows = PreferenceRows(random_pairs(28, seed=5), 48, format_ids=FORM)
    assert len(rows) >= 8
    return jax.tree.map(jnp.asarray, collate_preferences([rows[i] for i in range(8)]))


def update(loss_fn, params, frozen, batch, num_microbatches=1):
    step = functools.partial(
        train_step, loss_fn=loss_fn, tx=toy.KEEP_GRADIENTS, num_microbatches=num_microbatches
    )
    return jax.jit(step)(new_state(params, toy.KEEP_GRADIENTS), frozen, batch, jax.random.key(0))


@pytest.mark.parametrize('kept', [False, True])
def test_the_first_loss_is_log_2(policy, params, batch, kept):
    loss = PreferenceLoss(mask_format=True)
    if kept:
        reference = jax.jit(answer_log_probabilities(policy, loss))(params, batch)
        batch = batch.replace(reference=reference)
    _, found = update(preference_loss(policy, loss, kept=kept), params, {} if kept else params, batch)
    assert found['loss'] == pytest.approx(np.log(2), abs=1e-6)
    assert found['k1'] == pytest.approx(0, abs=1e-6) and found['k3'] == pytest.approx(0, abs=1e-6)


def test_the_first_loss_is_log_2_beside_adapters_whose_dropout_the_reference_never_sees(
    policy, params, batch
):
    lora = LoraConfig(rank=2, dropout=0.5, targets=('q', 'v'))
    adapters = init_adapters(lora, params, jax.random.key(1))
    loss_fn = with_base(preference_loss(policy, PreferenceLoss()), lora)
    _, found = update(loss_fn, adapters, params, batch)
    assert found['loss'] == pytest.approx(np.log(2), abs=1e-6)
    # Trained, the policy is another, and the reference the base still.
    moved = jax.tree.map(lambda leaf: leaf + 0.3, adapters)
    _, found = update(loss_fn, moved, params, batch)
    reference = jax.jit(answer_log_probabilities(policy, PreferenceLoss()))(params, batch)
    kept = with_base(preference_loss(policy, PreferenceLoss(), kept=True), lora)
    _, wanted = update(kept, moved, params, batch.replace(reference=reference))
    assert (
        found['loss'] == pytest.approx(float(wanted['loss']), rel=1e-5) != pytest.approx(np.log(2), abs=1e-2)
    )


@pytest.mark.parametrize(
    'kind',
    [
        'sigmoid',
        'reward',
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in LOSSES if kind != 'sigmoid'),
    ],
)
def test_four_microbatches_are_the_batch(policy, params, batch, kind):
    if kind == 'reward':
        loss_fn = reward_loss(REWARD, margin='small', centering=0.01, safety=0.5)
        params, frozen = toy.make_params(REWARD), {}
    else:
        nll = 0.0 if kind == 'kto' else 0.2
        loss_fn = preference_loss(policy, PreferenceLoss(kind, nll=nll), num_chunks=2)
        frozen = toy.make_params(policy, seed=1)
    # Odd rows hold less: a mean of the parts' means would be another.
    batch = batch.replace(weights=batch.weights * jnp.where(jnp.arange(8) % 4 == 1, 0.25, 1.0)[:, None])
    want_state, want = update(loss_fn, params, frozen, batch)
    state, found = update(loss_fn, params, frozen, batch, 4)
    for name in want:  # fp32 sums in another order
        assert found[name] == pytest.approx(float(want[name]), rel=2e-5, abs=1e-6), name
    toy.assert_same_gradients(state.opt_state, want_state.opt_state)


def test_answers_that_were_judged_alone_are_compared_with_answers_to_other_prompts(policy, params):
    """KTO by hand: z of the batch, each answer's loss; one batch or four parts; shared prompts or not."""
    loss = PreferenceLoss('kto', beta=0.3, desirable=1.5)
    frozen, params = params, toy.make_params(policy, seed=1)  # of which z is positive
    pairs = random_pairs(12, seed=7, num_prompts=5, alone=True)

    def batch_of(pairs, share):
        rows = PreferenceRows(pairs, 48, share_prompt=share)
        padded = PaddedRows(rows, 8)
        assert len(padded) == 8 and len(rows) > 1
        return jax.tree.map(jnp.asarray, collate_preferences([padded[i] for i in range(8)]))

    def log_p(pair, weights):
        (answer,) = (answer for answer in pair.answers if answer)
        whole = np.zeros(24, np.int32)
        tokens = np.concatenate([pair.prompt, answer.tokens])
        whole[: len(tokens)] = tokens
        by_id = np.asarray(jax.nn.log_softmax(apply(weights, whole[None])[0]), np.float64)
        slots = len(pair.prompt) + np.flatnonzero(answer.counts)
        return by_id[slots - 1, whole[slots]].sum()

    apply = jax.jit(lambda weights, tokens: policy.apply({'params': weights}, tokens)[0])
    others = mismatched(pairs)
    z = max(0.0, np.mean([log_p(pair, params) - log_p(pair, frozen) for pair in others]))
    wanted = []
    for pair in pairs:
        ratio, sign = log_p(pair, params) - log_p(pair, frozen), 1.0 if pair.answers[0] else -1.0
        weight = 1.5 if pair.answers[0] else 1.0
        wanted.append(weight * (1 - 1 / (1 + np.exp(-sign * 0.3 * (ratio - z)))))
    assert z > 0.01 and np.std(wanted) > 0.01
    for share in (False, True):
        model = policy.clone(attention_implementation='shared_prefix') if share else policy
        total, number = jax.jit(ratio_sums(model, loss))(params, frozen, batch_of(others, share))
        assert number == 12
        assert max(0.0, float(total / number)) == pytest.approx(z, rel=1e-5)
        batch = batch_of(pairs, share).replace(baseline=jnp.full(8, z, jnp.float32))
        for num_microbatches in (1, 4):
            _, found = update(preference_loss(model, loss), params, frozen, batch, num_microbatches)
            assert found['loss'] == pytest.approx(np.mean(wanted), rel=1e-5)
            assert found['weight'] == 6 and found['baseline'] == pytest.approx(z, rel=1e-6)


@pytest.mark.parametrize(
    'kind',
    [
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('sft', 'reward', 'sigmoid')),
        *(pytest.param(kind, marks=pytest.mark.long) for kind in LOSSES if kind != 'sigmoid'),
    ],
)
def test_eight_devices_and_four_microbatches_are_one_with_answers_of_1_and_of_400_tokens(kind):
    rng = np.random.default_rng(3)

    def answer(length):
        return Answer(rng.integers(1, 64, length).astype(np.int32), np.ones(length, bool), int(length > 1))

    prompts = [rng.integers(1, 64, 3).astype(np.int32) for _ in range(8)]
    pairs = [
        EncodedPair(prompt, (answer(400), answer(1)) if n % 3 else (answer(1), answer(400)), 1.0)
        for n, prompt in enumerate(prompts)
    ]
    rows = PreferenceRows(pairs, 416)
    batch = jax.tree.map(jnp.asarray, collate_preferences([rows[i] for i in range(8)]))
    mesh = make_mesh({'data': 2, 'tensor': 4})

    def step(model_of, params, frozen, batch, num_microbatches, partitioner=None):
        model = model_of(partitioner)
        if kind == 'sft':
            loss_fn = language_model_loss(model)
        elif kind == 'reward':
            loss_fn = reward_loss(model, margin='small', centering=0.01, safety=0.5)
        else:
            # KTO's gradient is scaled by a sigmoid of beta times some 1,000 nats, which fp32 rounds by 1e-4.
            beta = 0.01 if kind == 'kto' else 0.1
            loss_fn = preference_loss(model, PreferenceLoss(kind, beta=beta), num_chunks=2)
        return update(loss_fn, params, frozen, batch, num_microbatches)

    def model_of(partitioner):
        config = dataclasses.replace(toy.CONFIG, max_seq_len=512, scalar_head=kind == 'reward')
        made = LlamaForRewardModel if kind == 'reward' else LlamaForCausalLM
        return made(config, dtype=jnp.float32, partitioner=partitioner)

    params, frozen = (toy.make_params(model_of(None), seed=seed) for seed in range(2))
    if kind == 'sft':
        names = 'tokens', 'targets', 'positions', 'segment_ids', 'loss_mask'
        batch = LMBatch(*(getattr(batch, name) for name in names))
    want_state, want = step(model_of, params, frozen, batch, 1)
    partitioner = Partitioner(mesh)
    axes = param_axes(model_of(partitioner))
    placed, held = (jax.device_put(tree, partitioner.tree_shardings(tree, axes)) for tree in (params, frozen))
    parts = jax.device_put(batch, partitioner.sharding(('batch',)))
    with jax.set_mesh(mesh):
        state, found = step(model_of, placed, held, parts, 4, partitioner)
    for name in want:  # fp32 sums of thousands in another order
        assert found[name] == pytest.approx(float(want[name]), rel=5e-5, abs=1e-5), name
    toy.assert_same_gradients(state.opt_state, want_state.opt_state)


@pytest.mark.parametrize('mask_format', [False, True])
def test_a_batch_is_the_formula_over_its_pairs(policy, params, batch, mask_format):
    """Log-probabilities summed and counted in NumPy: the answers' alone, form left out where it is to be."""
    loss = PreferenceLoss('ipo', beta=0.3, nll=0.2, mask_format=mask_format)
    frozen = toy.make_params(policy, seed=1)
    assert np.any(batch.format_mask)
    _, found = update(preference_loss(policy, loss), params, frozen, batch)

    def by_token(weights):
        logits, _ = jax.jit(
            lambda w: policy.apply({'params': w}, batch.tokens, batch.positions, batch.segment_ids)
        )(weights)
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        return np.take_along_axis(log_p, np.asarray(batch.targets)[..., None], axis=-1)[..., 0]

    ours, theirs = by_token(params), by_token(frozen)
    policy_sums, reference, lengths, nll = [], [], [], []
    for row, place in np.argwhere(np.asarray(batch.weights) > 0):
        of_sides = []
        for side in range(2):
            of_answer = np.asarray(batch.segment_ids[row] == batch.pairs[row, place, side])
            counted = of_answer & np.asarray(batch.loss_mask[row])
            whole = ours[row][counted].sum() / max(1, counted.sum())
            if mask_format:
                counted &= ~np.asarray(batch.format_mask[row])
            of_sides.append((ours[row][counted].sum(), theirs[row][counted].sum(), counted.sum(), whole))
        for values, column in zip((policy_sums, reference, lengths), range(3), strict=True):
            values.append([side[column] for side in of_sides])
        nll.append(-of_sides[0][3])
    p, r, n = (
        jnp.asarray(np.array(values)[None], jnp.float32) for values in (policy_sums, reference, lengths)
    )
    wanted = np.mean(np.asarray(pair_losses(loss, p, r, n), np.float64)) + 0.2 * np.mean(nll)
    assert found['loss'] == pytest.approx(wanted, rel=1e-5)
    assert found['nll'] == pytest.approx(np.mean(nll), rel=1e-5)
    assert found['weight'] == len(nll)
