"""Context parallelism: which tokens of a row each device holds, and how it sees the keys of the others.

A causal token at the end of a row attends to all of it, one at the start to nothing but itself. So that all n devices
have equal work, a row is cut into 2n chunks and device i holds chunks i and 2n - 1 - i, as for Llama 3 (paper, section
3.3.2). This is the *balanced* order:

    row             0 1 2 3 4 5 6 7
    device (n = 4)  0: 0 7   1: 1 6   2: 2 5   3: 3 4

The model puts its tokens into this order at the top and its output back at the end, so nothing outside it knows; in
between all but attention works token by token. Attention gathers the keys and values of the whole row, which are
small beside the queries where heads are grouped, and each device attends with its own queries.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llama_jax.errors import InputError
from llama_jax.partitioning import LogicalAxes, Partitioner


@dataclasses.dataclass(frozen=True)
class ContextShard:
    """One device's place among the `size` devices that hold a row; made inside `jax.shard_map`.

    Attributes:
      axes: mesh axes that split the row.
      size: devices along them.
    """

    axes: tuple[str, ...]
    size: int

    def rank(self) -> Int[Array, '']:
        """Number of this part of the sequence, traced."""
        return jax.lax.axis_index(self.axes)

    def chunk_starts(self, seq_len: int) -> Int[Array, '2']:
        """Slots in the row of the first tokens of this device's two chunks."""
        rank = self.rank()
        return jnp.stack([rank, 2 * self.size - 1 - rank]) * (seq_len // (2 * self.size))

    def gather(self, x: Array) -> Array:
        """[B, T / n, ...] in balanced order -> the whole row [B, T, ...] in its own order."""
        batch, length = x.shape[:2]
        parts = jax.lax.all_gather(x, self.axes, axis=1, tiled=True)
        parts = parts.reshape(batch, self.size, 2, length // 2, *x.shape[2:])
        row = jnp.concatenate([parts[:, :, 0], parts[:, ::-1, 1]], axis=1)
        return row.reshape(batch, self.size * length, *x.shape[2:])


def context_shard(partitioner: Partitioner | None) -> ContextShard | None:
    """How the rows of activations are split; None where they are whole."""
    if partitioner is None or (size := partitioner.axis_size('length')) == 1:
        return None
    axes = dict(partitioner.rules)['length']
    return ContextShard(tuple(axis for axis in axes if partitioner.mesh.shape[axis] > 1), size)


def balanced_order(seq_len: int, size: int) -> Int[np.ndarray, 'T']:
    """Slot in the row of every token in balanced order, device after device."""
    chunks = np.arange(seq_len).reshape(2 * size, -1)
    return np.stack([chunks[:size], chunks[: size - 1 : -1]], axis=1).reshape(-1)


def to_balanced(x: Array, axes: LogicalAxes, partitioner: Partitioner) -> Array:
    """A sharded array [batch, length, ...] with its rows put from their own into balanced order.

    Raises:
      InputError: the rows do not divide into two chunks a device.
    """
    return _exchange(x, axes, partitioner, _send_to_balanced)


def from_balanced(x: Array, axes: LogicalAxes, partitioner: Partitioner) -> Array:
    """The inverse of `to_balanced`."""
    return _exchange(x, axes, partitioner, _send_from_balanced)


def _exchange(
    x: Array, axes: LogicalAxes, partitioner: Partitioner, send: Callable[[Array, ContextShard], Array]
) -> Array:
    shard = context_shard(partitioner)
    if shard is None:
        return x
    if x.shape[1] % (2 * shard.size):
        raise InputError(
            f'sequence length {x.shape[1]} does not divide into two chunks for each of the {shard.size} devices that '
            f'hold a row (mesh axes {" x ".join(shard.axes)}); make it a multiple of {2 * shard.size}'
        )
    spec = partitioner.spec(axes, x.shape, 'activation')
    return jax.shard_map(
        lambda local: send(local, shard),
        mesh=partitioner.mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )(x)


# In a row's own order device r holds chunks 2r and 2r + 1. Where the even ones go each device gets one, likewise the
# odd ones: two messages of half a shard.
def _routes(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of the even and of the odd chunks, from a row's own order to the balanced one."""
    holder = [min(chunk, 2 * size - 1 - chunk) for chunk in range(2 * size)]
    return [(r, holder[2 * r]) for r in range(size)], [(r, holder[2 * r + 1]) for r in range(size)]


def _send_to_balanced(x: Array, shard: ContextShard) -> Array:
    first, second = jnp.split(x, 2, axis=1)
    even_route, odd_route = _routes(shard.size)
    even = jax.lax.ppermute(first, shard.axes, even_route)
    odd = jax.lax.ppermute(second, shard.axes, odd_route)
    # A device's two chunks, i and 2n - 1 - i, are of different parity: i comes first.
    return _ordered(shard.rank() % 2 == 0, even, odd)


def _send_from_balanced(x: Array, shard: ContextShard) -> Array:
    low, high = jnp.split(x, 2, axis=1)
    even_first = shard.rank() % 2 == 0
    even_route, odd_route = ([(to, source) for source, to in route] for route in _routes(shard.size))
    even = jax.lax.ppermute(jnp.where(even_first, low, high), shard.axes, even_route)
    odd = jax.lax.ppermute(jnp.where(even_first, high, low), shard.axes, odd_route)
    return jnp.concatenate([even, odd], axis=1)


def _ordered(in_order: Array, first: Array, second: Array) -> Array:
    return jnp.concatenate([jnp.where(in_order, first, second), jnp.where(in_order, second, first)], axis=1)
