"""Cross-entropy against float64, from logits and folded into the head's product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.ops import cross_entropy
from llama_jax.ops.cross_entropy import (
    head_cross_entropy,
    token_distributions,
    token_log_probabilities,
    token_losses,
)
from llama_jax.ops.lora import LoraArray
from llama_jax.partitioning import Partitioner, make_mesh
from tests import toy

BATCH, LENGTH, EMBED_DIM, VOCAB_SIZE = 2, 12, 16, 40


def reference(logits: np.ndarray, targets: np.ndarray, z_loss: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses [B, T] and the gradient of their sum by the logits [B, T, V], in float64."""
    largest = logits.max(-1, keepdims=True)
    log_normalizer = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    losses = log_normalizer - np.take_along_axis(logits, targets[..., None], -1) + z_loss * log_normalizer**2
    gradient = np.exp(logits - log_normalizer) * (1 + 2 * z_loss * log_normalizer)
    gradient -= np.eye(logits.shape[-1])[targets]
    return losses[..., 0], gradient


def random_inputs(dtype=np.float32) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, LENGTH, EMBED_DIM)).astype(dtype)
    head = rng.normal(size=(VOCAB_SIZE, EMBED_DIM)).astype(np.float32)
    targets = rng.integers(VOCAB_SIZE, size=(BATCH, LENGTH)).astype(np.int32)
    return hidden, head, targets, rng.random(size=targets.shape) < 0.7


@pytest.mark.parametrize('z_loss', [0.0, 1e-2])
@pytest.mark.parametrize('offset', [0.0, 5000.0, -5000.0])  # exp of any of the two would leave fp32
def test_token_losses(offset, z_loss):
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(BATCH, LENGTH, VOCAB_SIZE)) + offset).astype(np.float32)
    targets = rng.integers(VOCAB_SIZE, size=(BATCH, LENGTH)).astype(np.int32)

    losses, vjp = jax.vjp(lambda logits: token_losses(logits, jnp.asarray(targets), z_loss), logits)

    expected, gradient = reference(logits.astype(np.float64), targets, z_loss)
    # The loss is a difference of logits: an fp32 rounding of those bounds it (5e-4 at 5000).
    atol = 2e-6 + 2e-7 * abs(offset)
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=atol)
    np.testing.assert_allclose(vjp(jnp.ones_like(losses))[0], gradient, rtol=3 * atol, atol=atol)


@pytest.mark.parametrize('z_loss', [0.0, 1e-2])
@pytest.mark.parametrize('num_chunks', [1, 3, 12])
def test_head_cross_entropy(num_chunks, z_loss):
    hidden, head, targets, mask = random_inputs()

    def both(hidden, head):
        return head_cross_entropy(hidden, head, jnp.asarray(targets), jnp.asarray(mask), num_chunks, z_loss)

    def loss(hidden, head):
        return 2.0 * both(hidden, head)[0]

    weights = (jnp.asarray(hidden), jnp.asarray(head))
    value, (hidden_gradient, head_gradient) = jax.value_and_grad(loss, argnums=(0, 1))(*weights)

    hidden64, head64 = hidden.astype(np.float64), head.astype(np.float64)
    losses, gradient = reference(hidden64 @ head64.T, targets, z_loss)
    gradient = 2 * gradient * mask[..., None]
    np.testing.assert_allclose(value, 2 * (losses * mask).sum(), rtol=1e-6)
    np.testing.assert_allclose(loss(*weights), value, rtol=1e-6)  # the path without a gradient is another one
    # fp32 sums of up to 40 terms of size 10.
    np.testing.assert_allclose(hidden_gradient, gradient @ head64, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(
        head_gradient, np.einsum('btv,btd->vd', gradient, hidden64), rtol=1e-5, atol=2e-5
    )
    assert (np.asarray(hidden_gradient)[~mask] == 0).all()

    likelihood = (reference(hidden64 @ head64.T, targets, 0.0)[0] * mask).sum()
    np.testing.assert_allclose(both(*weights)[1], likelihood, rtol=1e-6)
    (_, beside), (once, _) = jax.value_and_grad(both, argnums=(0, 1), has_aux=True)(*weights)
    np.testing.assert_allclose(beside, likelihood, rtol=1e-6)
    np.testing.assert_array_equal(2 * once, hidden_gradient)  # the second has no part in it


def test_bf16_activations_leave_loss_and_master_gradient_in_fp32():
    hidden, head, targets, mask = random_inputs(jnp.bfloat16)

    args = [jnp.asarray(a) for a in (hidden, head, targets, mask)]
    gradient_of = jax.value_and_grad(head_cross_entropy, argnums=(0, 1), has_aux=True)
    (value, _), gradients = gradient_of(*args, 3)

    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    rounded_head = head.astype(jnp.bfloat16).astype(np.float64)
    losses, gradient = reference(hidden.astype(np.float64) @ rounded_head.T, targets, 0.0)
    np.testing.assert_allclose(value, (losses * mask).sum(), rtol=1e-6)  # logits are not rounded to bf16
    expected = np.einsum('btv,btd->vd', gradient * mask[..., None], hidden.astype(np.float64))
    np.testing.assert_allclose(
        gradients[1], expected, atol=0.02
    )  # a few terms of size 3, each rounded by 2^-9


def test_chunks_save_the_memory_of_the_logits():
    shapes = [(2, 256, 32), (8192, 32), (2, 256), (2, 256)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.bool_]
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def temporary_bytes(num_chunks: int) -> int:
        gradient = jax.grad(lambda *args: head_cross_entropy(*args, num_chunks)[0], argnums=(0, 1))
        return jax.jit(gradient).lower(*args).compile().memory_analysis().temp_size_in_bytes

    logits_bytes = 2 * 256 * 8192 * 4
    assert temporary_bytes(1) >= logits_bytes
    assert temporary_bytes(16) < logits_bytes / 2


def test_length_must_divide_into_chunks():
    with pytest.raises(InputError, match='12.*5'):
        head_cross_entropy(*(jnp.asarray(a) for a in random_inputs()), 5)


@pytest.mark.parametrize('num_chunks', [1, 4])
def test_log_probabilities_by_token_are_those_of_the_logits(num_chunks):
    rng = np.random.default_rng(3)
    hidden, head = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 8, 16), (VOCAB_SIZE, 16))
    )
    targets = jnp.asarray(rng.integers(VOCAB_SIZE, size=(2, 8)))
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    expected = -reference(logits, np.asarray(targets), 0.0)[0]
    found = token_log_probabilities(hidden, head, targets, num_chunks)
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # fp32 sums of 16 and 40 terms

    def total(function):  # weights of both signs, as an advantage has
        weighed = jax.grad(lambda h, w: jnp.sum(jnp.cos(targets) * function(h, w)), argnums=(0, 1))
        return jax.jit(weighed)(hidden, head)

    chunked = total(lambda h, w: token_log_probabilities(h, w, targets, num_chunks))
    whole = total(lambda h, w: -token_losses(jnp.einsum('btd,vd->btv', h, w), targets))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), chunked, whole)


@pytest.mark.parametrize('parts', [1, 2])
def test_where_no_target_is_wanted_nothing_is_projected(parts, monkeypatch):
    """An eighth of the targets, scattered: two of sixteen pieces hold them, whatever the rest are."""
    rng = np.random.default_rng(3)
    length, taken = 1024 * parts, []
    hidden, head = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, length, 8), (VOCAB_SIZE, 8))
    )
    targets = jnp.asarray(rng.integers(VOCAB_SIZE, size=(4, length)))
    mask = rng.permuted(
        np.arange(4 * length).reshape(parts, -1) % (4 * length // parts) < length // 2, axis=1
    )
    mask = jnp.asarray(mask.reshape(4, length))
    partitioner = Partitioner(make_mesh({'data': parts}, jax.devices()[:parts]))
    weigh = jnp.cos(targets)

    def total(h, w, wanted):
        return jnp.sum(weigh * wanted(h, w))

    def all_of_them(h, w):
        return jnp.where(mask, token_log_probabilities(h, w, targets, 4), 0.0)

    whole = jax.value_and_grad(total, argnums=(0, 1))(hidden, head, all_of_them)

    def counted(logits, targets):
        jax.debug.callback(lambda: taken.append(1))
        return token_losses(logits, targets)

    monkeypatch.setattr(cross_entropy, 'token_losses', counted)

    def of_wanted(h, w):
        return token_log_probabilities(h, w, targets, 4, partitioner, mask=mask)

    with jax.set_mesh(partitioner.mesh):
        split = jax.device_put(hidden, partitioner.sharding(('batch',)))
        jax.block_until_ready(jax.jit(of_wanted)(split, head))
        jax.effects_barrier()
        assert len(taken) == 2 * parts  # of 16 pieces, on each device
        part = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)(split, head, of_wanted)
        found = jax.jit(token_distributions, static_argnums=(3, 4))(
            split, head, targets, 4, partitioner, mask=mask
        )
    np.testing.assert_allclose(part[0], whole[0], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), part[1], whole[1])
    for values, everywhere in zip(found, token_distributions(hidden, head, targets, 4), strict=True):
        np.testing.assert_allclose(values, jnp.where(mask, everywhere, 0.0), rtol=1e-5)


@pytest.mark.parametrize('z_loss', [0.0, 1e-2])
def test_of_a_frozen_head_no_gradient_is_made(z_loss):
    hidden, head, targets, mask = map(jnp.asarray, random_inputs())

    def loss(hidden, head):
        return head_cross_entropy(hidden, head, targets, mask, 3, z_loss)[0]

    frozen, trained = jax.grad(loss), jax.grad(loss, argnums=(0, 1))
    np.testing.assert_array_equal(frozen(hidden, head), trained(hidden, head)[0])
    of_head = f'f32[{EMBED_DIM},{VOCAB_SIZE}]'
    shown = [str(jax.make_jaxpr(fn)(hidden, head)) for fn in (frozen, trained)]
    assert [of_head in text for text in shown] == [False, True]


@pytest.mark.parametrize('axes', [(-1,), (-2,)])  # of a head, and of an embedding that is the head
def test_a_head_with_an_adapter(axes):
    hidden, head, targets, mask = map(jnp.asarray, random_inputs())
    sizes = {(-1,): (EMBED_DIM, VOCAB_SIZE), (-2,): (VOCAB_SIZE, EMBED_DIM)}[axes]
    rng = np.random.default_rng(1)
    a, b = (jnp.float32(rng.normal(size=size)) for size in ((sizes[0], 3), (3, sizes[1])))

    def loss(parts, whole):
        weight = LoraArray(head, *parts, scale=0.3, axes=axes)
        weight = weight.materialize() if whole else weight
        losses = head_cross_entropy(hidden, weight, targets, mask, 3, 1e-2)
        return losses[0] + 0.5 * token_log_probabilities(hidden, weight, targets, 3).sum()

    found, wanted = (jax.value_and_grad(loss)((a, b), whole) for whole in (False, True))
    # A sum of losses less half of one that is as large: roundings of the terms, not of what is left.
    np.testing.assert_allclose(found[0], wanted[0], rtol=4e-6)
    toy.assert_same_gradients(*(dict(zip('ab', gradients, strict=True)) for _, gradients in (found, wanted)))
