"""Next-token cross-entropy, with the head's product folded in so that [B, T, V] logits need never exist."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from llama_jax.errors import InputError
from llama_jax.ops.linear import Weight, einsum, materialize
from llama_jax.ops.lora import LoraArray
from llama_jax.partitioning import Partitioner

# Pieces that a device's tokens are taken in where not all are wanted: of so many tokens at least, as the product with
# the head is no faster of fewer, and so many at most, as each adds to a gradient of the head's size.
_LEAST_PIECE, _MOST_PIECES = 256, 16


def token_losses(
    logits: Float[Array, 'B T V'], targets: Int[Array, 'B T'], z_loss: float = 0.0
) -> Float[Array, 'B T']:
    """-log softmax(logits)[target] in nats, fp32, plus z_loss * (log of the normaliser)^2 (PaLM, section 5)."""
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    return log_normalizer - target_logits + z_loss * jnp.square(log_normalizer)


def token_log_probabilities(
    hidden: Float[Array, 'B T D'],
    head: Weight,
    targets: Int[Array, 'B T'],
    num_chunks: int = 1,
    partitioner: Partitioner | None = None,
    temperature: float = 1.0,
    mask: Bool[Array, 'B T'] | None = None,
) -> Float[Array, 'B T']:
    """Log softmax(hidden @ head.T)[target] of every token in nats, fp32; what preferences and policies are scored by.

    Peak memory is one chunk's logits, in the backward pass too, which computes them again.

    Args:
      hidden: normalised outputs of the last layer.
      head: [V, D].
      targets: ids.
      num_chunks: pieces that the sequence is taken in.
      partitioner: as for `head_cross_entropy`.
      temperature: divides the logits.
      mask: the targets that are asked for; of the others it is 0. Each device takes its own of these first, and of what
        then comes in pieces those that hold none are not multiplied with the head, forwards or backwards.

    Raises:
      InputError: T is not a multiple of `num_chunks`.
    """

    def measure(logits, target):
        return [-token_losses(logits / temperature, target)]

    return _by_token(hidden, head, targets, mask, num_chunks, partitioner, measure)[0]


def token_distributions(
    hidden: Float[Array, 'B T D'],
    head: Weight,
    targets: Int[Array, 'B T'],
    num_chunks: int = 1,
    partitioner: Partitioner | None = None,
    temperature: float = 1.0,
    mask: Bool[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
    """As `token_log_probabilities`, with the entropy of each token's distribution in nats, which has no gradient."""

    def measure(logits, target):
        logits = logits / temperature
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits), axis=-1)
        return [-token_losses(logits, target), -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)]

    log_p, entropies = _by_token(hidden, head, targets, mask, num_chunks, partitioner, measure)
    return log_p, jax.lax.stop_gradient(entropies)


def _losses_by_chunk(hidden, head, targets, num_chunks, z_loss, partitioner):
    """[B, T] of each of `_weights`, with gradients into all that the head is made of."""

    def measure(logits, target):
        return [token_losses(logits, target, z) for z in _weights(z_loss)]

    return _by_chunk(hidden, head, targets, num_chunks, partitioner, measure)


def _by_token(hidden, head, targets, mask, num_chunks, partitioner, measure):
    """[B, T] of each of what `measure` makes of logits and targets, 0 where the mask does not ask for it."""
    if mask is None:
        return _by_chunk(hidden, head, targets, num_chunks, partitioner, measure)
    parts = 1 if partitioner is None else partitioner.axis_size('batch')
    if hidden.shape[0] % parts or (partitioner is not None and partitioner.axis_size('length') > 1):
        found = _by_chunk(hidden, head, targets, num_chunks, partitioner, measure)
    else:
        found = _of_wanted(hidden, head, targets, mask, num_chunks, parts, partitioner, measure)
    return [jnp.where(mask, values, 0.0) for values in found]


def _by_chunk(hidden, head, targets, num_chunks, partitioner, measure):
    """[B, T] of each of what `measure` makes of a chunk's logits and targets."""
    weight = _gathered_parts(head, hidden.dtype, partitioner)

    @jax.checkpoint
    def of_chunk(x, target):
        return measure(einsum('btd,vd->btv', x, weight, jnp.float32), target)

    def body(_, chunk):
        return None, of_chunk(*chunk)

    _, by_chunk = jax.lax.scan(body, None, _chunks((hidden, targets), num_chunks))
    return [jnp.moveaxis(losses, 0, 2).reshape(targets.shape) for losses in by_chunk]


def _of_wanted(hidden, head, targets, mask, num_chunks, parts, partitioner, measure):
    """[B, T] of each of what `measure` makes, 0 in pieces that hold none; `parts` devices split the rows."""
    _chunks((hidden,), num_chunks)  # refuses what does not divide
    weight = _gathered_parts(head, hidden.dtype, partitioner)
    size = mask.size // parts
    order = jnp.argsort(~mask.reshape(parts, size), axis=1, stable=True)

    def in_order(x):
        flat = x.reshape(parts, size, *x.shape[2:])
        return jnp.take_along_axis(flat, order.reshape(*order.shape, *[1] * (flat.ndim - 2)), axis=1)

    def pieces_of(x):
        return jnp.moveaxis(x.reshape(parts, number, size // number, *x.shape[2:]), 1, 0)

    number = max(
        (n for n in range(num_chunks, _MOST_PIECES + 1, num_chunks) if not size % n and size // n >= _LEAST_PIECE),
        default=num_chunks,
    )  # fmt: skip

    @jax.checkpoint
    def of_piece(x, target, wanted):
        def project(x):
            return measure(einsum('btd,vd->btv', x, weight, jnp.float32), target)

        def leave_out(x):
            return [jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.eval_shape(project, x)]

        return jax.lax.cond(jnp.any(wanted), project, leave_out, x)

    def body(_, piece):
        return None, of_piece(*piece)

    arrays = [pieces_of(in_order(x)) for x in (hidden, targets, mask)]
    _, found = jax.lax.scan(body, None, arrays)
    back = jnp.argsort(order, axis=1)
    found = [jnp.moveaxis(values, 0, 1).reshape(parts, size) for values in found]
    return [jnp.take_along_axis(values, back, axis=1).reshape(mask.shape) for values in found]


def _gathered_parts(head, dtype, partitioner):
    """The head gathered: as one array, or as that of the base with its adapter beside it."""
    if not isinstance(head, LoraArray):
        return _gathered(materialize(head).astype(dtype), partitioner)
    return dataclasses.replace(head, base=_gathered(materialize(head.base).astype(dtype), partitioner))


def head_cross_entropy(
    hidden: Float[Array, 'B T D'],
    head: Weight,
    targets: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
    num_chunks: int = 1,
    z_loss: float = 0.0,
    partitioner: Partitioner | None = None,
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Sum over unmasked tokens of the loss of logits = hidden @ head.T, the sequence taken in `num_chunks` pieces.

    Peak memory is one chunk's logits. The backward pass recomputes nothing: as the loss is the end of the line, each
    chunk's gradient is taken while its logits are at hand (three products in all, as many as the plain loss costs; two
    where the head is frozen) and only scaled later. With a partitioner the head is gathered, and its gradient summed
    over devices, once whatever the number of chunks. Of a head with an adapter, whose gradient is the adapter's alone,
    the backward pass does compute each chunk's logits again.

    Returns:
      The loss, to minimise, and what of it is negative log-likelihood, to read: it has no gradient.

    Raises:
      InputError: T is not a multiple of `num_chunks`.
    """
    if isinstance(head, LoraArray):  # its parts are small, and the gradient of what they add up to is not
        by_token = _losses_by_chunk(hidden, head, targets, num_chunks, z_loss, partitioner)
        sums: Any = [jnp.sum(losses, where=mask) for losses in by_token]
        return sums[0], jax.lax.stop_gradient(sums[-1])
    sums = _head_cross_entropy(hidden, materialize(head), targets, mask, num_chunks, z_loss, partitioner)
    return sums[0], jax.lax.stop_gradient(sums[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _head_cross_entropy(hidden, head, targets, mask, num_chunks, z_loss, partitioner):
    chunks = _chunks((hidden, targets, mask), num_chunks)
    weight = _gathered(head.astype(hidden.dtype), partitioner)

    def chunk_loss(sums, chunk):
        x, target, keep = chunk
        logits = einsum('btd,vd->btv', x, weight, jnp.float32)
        losses = [token_losses(logits, target, z) for z in _weights(z_loss)]
        return _add(sums, losses, keep), None

    return jax.lax.scan(chunk_loss, (jnp.float32(0.0),) * len(_weights(z_loss)), chunks)[0]


def _weights(z_loss):
    """Of the squared log-normaliser in the sums that are taken: the loss, and where that has more, the likelihood."""
    return (z_loss, 0.0) if z_loss else (0.0,)


def _add(sums, losses, keep):
    return tuple(total + jnp.sum(each, where=keep) for total, each in zip(sums, losses, strict=True))


def _gathered(weight, partitioner):
    """The head with whole rows on every device, so that not every chunk gathers it anew."""
    return weight if partitioner is None else partitioner.shard(weight, ('vocab', 'act_embed'), 'head')


def _chunks(arrays, num_chunks):
    """[B, T, ...] -> [num_chunks, B, T / num_chunks, ...] of each array.

    Token t goes to chunk t % num_chunks: where rows are split over devices, each has its part of every chunk.
    """
    length = arrays[0].shape[1]
    if length % num_chunks:
        raise InputError(f'sequence length {length} is not a multiple of the {num_chunks} loss chunks')

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, num_chunks, *x.shape[2:]), 2, 0)

    return tuple(map(split, arrays))


def _forward(hidden, head, targets, mask, num_chunks, z_loss, partitioner):
    hidden, targets, mask = hidden.value, targets.value, mask.value
    head, is_trained = head.value, head.perturbed
    weight = _gathered(head.astype(hidden.dtype), partitioner)
    parts = _token_parts(hidden.shape[0], hidden.shape[1] // num_chunks, partitioner)

    def chunk_gradients(carry, chunk):
        sums, head_gradient = carry
        x, target, keep = chunk
        logits = einsum('btd,vd->btv', x, weight, jnp.float32)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[:, :, 0]
        losses = [log_normalizer - target_logits + z * jnp.square(log_normalizer) for z in _weights(z_loss)]
        # d loss / d logits = softmax * (1 + 2 z log Z) - onehot(target), and 0 where masked.
        probabilities = jnp.exp(logits - log_normalizer[:, :, None])
        scale = jnp.where(keep, 1.0 + 2.0 * z_loss * log_normalizer, 0.0)[:, :, None]
        is_target = target[:, :, None] == jnp.arange(head.shape[0])[None, None, :]
        logits_gradient = probabilities * scale - jnp.where(is_target & keep[:, :, None], 1.0, 0.0)
        logits_gradient = logits_gradient.astype(hidden.dtype)
        x_gradient = einsum('btv,vd->btd', logits_gradient, weight)
        if is_trained:
            head_gradient = place(head_gradient + product(x, logits_gradient))
        return (_add(sums, losses, keep), head_gradient), x_gradient

    def product(x, logits_gradient):
        if not parts:
            return einsum('btd,btv->dv', x, logits_gradient, jnp.float32)
        rows, columns = parts
        x, logits_gradient = (
            a.reshape(rows, a.shape[0] // rows, columns, a.shape[1] // columns, a.shape[2])
            for a in (x, logits_gradient)
        )
        return einsum('rbctd,rbctv->rcdv', x, logits_gradient, jnp.float32)

    def place(sums):
        axes = ('batch', 'length', 'act_embed', 'vocab')
        return partitioner.shard(sums, axes, 'head gradient') if parts else sums

    # Summed as [D, V] and turned once: the other way round XLA would turn the far larger logits of every chunk.
    start = (
        (jnp.float32(0.0),) * len(_weights(z_loss)),
        place(jnp.zeros((*parts, *head.shape[::-1]), jnp.float32)) if is_trained else None,
    )
    (sums, head_gradient), x_gradients = jax.lax.scan(
        chunk_gradients, start, _chunks((hidden, targets, mask), num_chunks)
    )
    if head_gradient is None:
        return sums, (jnp.moveaxis(x_gradients, 0, 2).reshape(hidden.shape), None)
    if parts:
        head_gradient = _sum_over_devices(head_gradient, partitioner)
        # The sum over devices comes before the layers' backward pass: after it, the parts would be held all along.
        x_gradients, head_gradient = jax.lax.optimization_barrier((x_gradients, head_gradient))
    return sums, (jnp.moveaxis(x_gradients, 0, 2).reshape(hidden.shape), head_gradient.T.astype(head.dtype))


def _token_parts(batch, length, partitioner):
    """How many parts devices split the rows and the length of a chunk into, each with a head gradient of its own.

    () where one sum is kept for all: on one device, and where parts or vocabulary do not divide over the mesh so.
    """
    if partitioner is None or partitioner.mesh.size == 1:
        return ()
    tokens = (*_axes(partitioner, 'batch'), *_axes(partitioner, 'length'))
    rows, columns = partitioner.axis_size('batch'), partitioner.axis_size('length')
    if batch % rows or length % columns or set(tokens) & set(_axes(partitioner, 'vocab')):
        return ()
    copies = _copies(partitioner)
    return (rows, columns) if copies == tokens[: len(copies)] else ()


def _axes(partitioner, axis):
    """The mesh axes that really split a logical axis."""
    return tuple(a for a in dict(partitioner.rules)[axis] if partitioner.mesh.shape[a] > 1)


def _copies(partitioner):
    """The mesh axes that split the batch and not the head: each of their parts has a copy of the head."""
    return tuple(a for a in _axes(partitioner, 'batch') if a not in _axes(partitioner, 'embed'))


def _sum_over_devices(sums: Float[Array, 'R C D V'], partitioner: Partitioner) -> Float[Array, 'D V']:
    """The sum of the parts, split as the head is: within each copy of it first, so that least goes between slices."""
    copies = _copies(partitioner)
    number = math.prod(partitioner.mesh.shape[a] for a in copies)
    spec = partitioner.spec(('embed', 'vocab'), sums.shape[2:], 'head gradient')
    within = jnp.sum(sums.reshape(number, -1, *sums.shape[2:]), axis=1)
    within = jax.lax.with_sharding_constraint(
        within, NamedSharding(partitioner.mesh, PartitionSpec(copies or None, *spec))
    )
    return partitioner.shard(jnp.sum(within, axis=0), ('embed', 'vocab'), 'head gradient')


def _backward(num_chunks, z_loss, partitioner, residuals, cotangents):
    del num_chunks, z_loss, partitioner
    cotangent = cotangents[0]
    hidden_gradient, head_gradient = residuals
    return (
        (hidden_gradient * cotangent).astype(hidden_gradient.dtype),
        None if head_gradient is None else (head_gradient * cotangent).astype(head_gradient.dtype),
        None,
        None,
    )


# With them, `_forward` is told whether there is a gradient to be taken of the head: of a frozen one it makes none.
_head_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
