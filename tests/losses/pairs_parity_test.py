"""Twenty steps of a reward model and of a policy against a plain PyTorch loop over Hugging Face's Llama."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.preferences import Answer, EncodedPair, PreferenceRows, collate_preferences
from llama_jax.losses.dpo import PreferenceLoss, preference_loss
from llama_jax.losses.reward import reward_loss
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama_jax.train.state import new_state
from llama_jax.train.step import train_step
from tests.models.parity_test import RELEASES, random_params, small_config
from tests.reference import huggingface_llama

RELEASE = 'llama3_8b'  # grouped queries
PAIRS, LEARNING_RATE, NUM_STEPS = 6, 1e-3, 20


@pytest.fixture(scope='module')
def torch():
    pytest.importorskip('transformers', reason='needs transformers: the extra `parity`')
    return pytest.importorskip('torch', reason='needs torch: the extra `parity`')


@pytest.fixture(scope='module')
def params():
    return random_params(RELEASES[RELEASE], np.random.default_rng(0), 0.3)


@pytest.fixture(scope='module')
def pairs() -> list[EncodedPair]:
    rng = np.random.default_rng(2)
    vocab = small_config(RELEASE).vocab_size

    def tokens(least, most):
        return rng.integers(3, vocab, size=rng.integers(least, most)).astype(np.int32)

    def answer():
        found = tokens(2, 12)
        return Answer(found, np.ones(len(found), bool))

    return [EncodedPair(tokens(2, 8), (answer(), answer()), float(i % 4)) for i in range(PAIRS)]


def our_batch(pairs):
    rows = PreferenceRows(pairs, 64)
    return jax.tree.map(jnp.asarray, collate_preferences([rows[i] for i in range(len(rows))]))


def our_steps(loss_fn, params, frozen, batch, num_steps: int = 1):
    """(loss and gradient norm of each step, the last weights)."""
    tx = make_optimizer(
        OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=0.0), LEARNING_RATE
    )
    state = new_state(jax.tree.map(jnp.asarray, params), tx)
    step, figures = jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=tx)), []
    for _ in range(num_steps):
        state, found = step(state, jax.tree.map(jnp.asarray, frozen), batch, jax.random.key(0))
        figures.append((float(found['loss']), float(found['grad_norm'])))
    return np.array(figures), state.params


def padded(torch, pairs, pad: int = 0):
    """All preferred, then all others, padded at their right: ids, mask, and which tokens are of the answer."""
    rows = [np.concatenate([p.prompt, p.answers[side].tokens]) for side in range(2) for p in pairs]
    width = max(map(len, rows))
    ids = np.full((len(rows), width), pad)
    mask, of_answer = np.zeros_like(ids), np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        of_answer[i, len(pairs[i % len(pairs)].prompt) : len(row)] = 1
    return tuple(torch.tensor(x) for x in (ids, mask, of_answer))


def torch_policy(params):
    release = RELEASES[RELEASE]
    return huggingface_llama.make_model(release.hparams, params, release.max_seq_len)


def gradient_norm(torch, model) -> float:
    return float(torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None)))


def torch_steps(torch, model, frozen, loss_of, num_steps: int) -> np.ndarray:
    """(loss, gradient norm) of each step of a plain loop with AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    figures = []
    for _ in range(num_steps):
        loss = loss_of(model, frozen)
        optimizer.zero_grad()
        loss.backward()
        figures.append((loss.item(), gradient_norm(torch, model)))
        optimizer.step()
    return np.array(figures)


@pytest.mark.slow
def test_a_policy_is_trained_as_by_a_plain_loop(torch, params, pairs):
    """DPO from the reference itself: the loss of each step to 1e-4, and of the first to 1e-5."""
    model, frozen = torch_policy(params).train(), torch_policy(params)
    ids, mask, of_answer = padded(torch, pairs)

    def log_probabilities(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
        by_token = logits.gather(-1, ids[:, 1:, None])[..., 0]
        return (by_token * of_answer[:, 1:]).sum(-1).chunk(2)

    def loss_of(model, frozen):
        better, worse = log_probabilities(model)
        with torch.no_grad():
            reference = log_probabilities(frozen)
        ratio = (better - reference[0]) - (worse - reference[1])
        return -torch.nn.functional.logsigmoid(0.3 * ratio).mean()

    wanted = torch_steps(torch, model, frozen, loss_of, NUM_STEPS)
    ours = LlamaForCausalLM(small_config(RELEASE), dtype=jnp.float32)
    loss_fn = preference_loss(ours, PreferenceLoss(beta=0.3))
    found, last = our_steps(loss_fn, params, params, our_batch(pairs), NUM_STEPS)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-4, atol=1e-5)
    assert found[-1, 0] < 0.5 * found[0, 0]
    np.testing.assert_allclose(last['embed'], model.model.embed_tokens.weight.detach().numpy(), atol=1e-4)


@pytest.mark.slow
def test_a_reward_model_is_trained_as_by_a_plain_loop(torch, params, pairs):
    """With margins: the loss of each step to 1e-4, and of the first to 1e-5."""
    score = np.random.default_rng(3).normal(0, 0.1, params['embed'].shape[1]).astype(np.float32)
    trunk, head = torch_policy(params).model.train(), torch.nn.Parameter(torch.tensor(score))
    ids, mask, _ = padded(torch, pairs)
    margins, last_token = torch.tensor([p.margin for p in pairs]), mask.sum(-1) - 1

    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = trunk, head

        def forward(self):
            hidden = self.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            return (hidden[torch.arange(len(ids)), last_token] @ self.head).chunk(2)

    def loss_of(model, _):
        better, worse = model()
        return -torch.nn.functional.logsigmoid(better - worse - margins / 3).mean()

    model = Scored()
    wanted = torch_steps(torch, model, None, loss_of, NUM_STEPS)
    ours = LlamaForRewardModel(
        dataclasses.replace(small_config(RELEASE), scalar_head=True), dtype=jnp.float32
    )
    weights = {name: leaf for name, leaf in params.items() if name != 'head'} | {'score': score}
    found, last = our_steps(reward_loss(ours, margin='small'), weights, {}, our_batch(pairs), NUM_STEPS)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-4, atol=1e-5)
    assert found[-1, 0] < 0.5 * found[0, 0]
    np.testing.assert_allclose(last['score'], model.head.detach().numpy(), atol=1e-4)
