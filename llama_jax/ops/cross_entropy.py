"""Next-token cross-entropy, with the head's product folded in so that [B, T, V] logits need never exist."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.ops.linear import einsum
from llama_jax.types import InputError


def token_losses(
    logits: Float[Array, 'B T V'], targets: Int[Array, 'B T'], z_loss: float = 0.0
) -> Float[Array, 'B T']:
    """-log softmax(logits)[target] in nats, fp32, plus z_loss * (log of the normaliser)^2 (PaLM, section 5)."""
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    return log_normalizer - target_logits + z_loss * jnp.square(log_normalizer)


def head_cross_entropy(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'V D'],
    targets: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
    num_chunks: int = 1,
    z_loss: float = 0.0,
) -> Float[Array, '']:
    """Sum over unmasked tokens of the loss of logits = hidden @ head.T, the sequence taken in `num_chunks` pieces.

    Peak memory is one chunk's logits. The backward pass recomputes nothing: as the loss is the end of the line, each
    chunk's gradient is taken while its logits are at hand (three products in all, as many as the plain loss costs) and
    only scaled later.

    Raises:
      InputError: T is not a multiple of `num_chunks`.
    """
    return _head_cross_entropy(hidden, head, targets, mask, num_chunks, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _head_cross_entropy(hidden, head, targets, mask, num_chunks, z_loss):
    chunks = _chunks(hidden, targets, mask, num_chunks)

    def chunk_loss(total, chunk):
        x, target, keep = chunk
        logits = einsum('btd,vd->btv', x, head, jnp.float32)
        return total + jnp.sum(token_losses(logits, target, z_loss), where=keep), None

    return jax.lax.scan(chunk_loss, jnp.float32(0.0), chunks)[0]


def _chunks(hidden, targets, mask, num_chunks):
    """[B, T, ...] -> [num_chunks, B, T / num_chunks, ...] of each argument.

    Token t goes to chunk t % num_chunks: where rows are split over devices, each has its part of every chunk.
    """
    if hidden.shape[1] % num_chunks:
        raise InputError(
            f'sequence length {hidden.shape[1]} is not a multiple of the {num_chunks} loss chunks'
        )

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, num_chunks, *x.shape[2:]), 2, 0)

    return split(hidden), split(targets), split(mask)


def _forward(hidden, head, targets, mask, num_chunks, z_loss):
    weight = head.astype(hidden.dtype)

    def chunk_gradients(carry, chunk):
        total, head_gradient = carry
        x, target, keep = chunk
        logits = einsum('btd,vd->btv', x, weight, jnp.float32)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[:, :, 0]
        losses = log_normalizer - target_logits + z_loss * jnp.square(log_normalizer)
        # d loss / d logits = softmax * (1 + 2 z log Z) - onehot(target), and 0 where masked.
        probabilities = jnp.exp(logits - log_normalizer[:, :, None])
        scale = jnp.where(keep, 1.0 + 2.0 * z_loss * log_normalizer, 0.0)[:, :, None]
        is_target = target[:, :, None] == jnp.arange(head.shape[0])[None, None, :]
        logits_gradient = probabilities * scale - jnp.where(is_target & keep[:, :, None], 1.0, 0.0)
        logits_gradient = logits_gradient.astype(hidden.dtype)
        x_gradient = einsum('btv,vd->btd', logits_gradient, weight)
        head_gradient = head_gradient + einsum('btd,btv->dv', x, logits_gradient, jnp.float32)
        return (total + jnp.sum(losses, where=keep), head_gradient), x_gradient

    # Summed as [D, V] and turned once: the other way round XLA would turn the far larger logits of every chunk.
    start = (jnp.float32(0.0), jnp.zeros(head.shape[::-1], jnp.float32))
    (total, head_gradient), x_gradients = jax.lax.scan(
        chunk_gradients, start, _chunks(hidden, targets, mask, num_chunks)
    )
    return total, (jnp.moveaxis(x_gradients, 0, 2).reshape(hidden.shape), head_gradient.T.astype(head.dtype))


def _backward(num_chunks, z_loss, residuals, cotangent):
    del num_chunks, z_loss
    hidden_gradient, head_gradient = residuals
    return (
        (hidden_gradient * cotangent).astype(hidden_gradient.dtype),
        (head_gradient * cotangent).astype(head_gradient.dtype),
        None,
        None,
    )


_head_cross_entropy.defvjp(_forward, _backward)
